"""Renders a plan as one self-contained HTML page, with charts of its memory and time."""

from collections import defaultdict

from markupsafe import Markup

from megatron_post.pages.charts import spans, stacked
from megatron_post.pages.page import cards, document, element, figures
from megatron_post.plan.estimate import Plan, layout_line, verdict
from megatron_post.plan.hardware import GIB
from megatron_post.plan.report import time_rows
from megatron_post.plan.shape import model_parameters


def page(plan: Plan) -> str:
    """The whole document."""
    facts = {
        "a step": f"{plan.time.seconds:.2f} s",
        "tokens/s/GPU": f"{plan.tokens_per_second_per_gpu:,.0f}",
        "MFU (bf16 peak)": f"{plan.model_flops_utilization:.1%}",
        "mean bubble": f"{plan.time.timeline.bubble:.1%}",
        "fullest rank": f"{plan.fullest.total / GIB:.1f} GiB",
        "parameters": f"{model_parameters(plan.config):,}",
    }
    pack = f"{plan.microbatches} microbatches of {plan.config.data.pack_length:,} tokens a data-parallel rank"
    memory = {
        f"rank {rank.pipeline_rank}": {kind: size / GIB for kind, size in rank.kinds.items()}
        for rank in plan.memory
    }
    capacity = plan.gpu.memory / GIB
    parts = [
        element("p", f"{layout_line(plan.config, plan.data_size)}; {pack}", kind="faint"),
        element("div", verdict(plan), kind="verdict" if plan.shortfall <= 0 else "verdict not"),
        cards(facts),
        *(element("p", note, kind="faint") for note in plan.notes),
        figures(
            [
                stacked(
                    "Memory of each pipeline rank",
                    memory,
                    x="GiB",
                    limit=(capacity, f"the memory of a GPU, {capacity:.1f} GiB"),
                ),
                stacked("A step on the busiest rank", {"step": time_rows(plan)}, x="seconds"),
                _timeline(plan),
            ]
        ),
        element(
            "p",
            "The planner has predicted this. docs/planner.md says what was measured and what is assumed.",
            kind="faint",
        ),
    ]
    return document(f"{plan.config.stage} on {plan.gpus} x {plan.gpu.name}", parts)


def _timeline(plan: Plan) -> Markup:
    timeline, virtual = plan.time.timeline, plan.config.parallel.virtual_pipeline
    rows: dict[str, dict[str, list[tuple[float, float]]]] = {
        f"rank {rank}": defaultdict(list) for rank in range(timeline.pipeline)
    }
    strengths = {}
    for event in timeline.events:
        name = f"{event.task.kind}, chunk {event.task.chunk}"
        strengths[name] = 1 - 0.6 * (virtual - 1 - event.task.chunk) / max(1, virtual - 1)
        rows[f"rank {event.rank}"][name].append((event.start, event.end))
    title = "The pipeline: gaps are the bubble" + (", later chunks are stronger" if virtual > 1 else "")
    return spans(title, rows, x="seconds", strengths=dict(sorted(strengths.items(), reverse=True)))
