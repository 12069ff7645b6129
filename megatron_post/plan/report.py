"""Prints a plan, a search or a dry run as tables, and converts them to JSON."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megatron_post.config.load import read_tree
from megatron_post.config.overrides import merged, with_overrides
from megatron_post.config.yaml_text import write_yaml
from megatron_post.plan.estimate import Plan, layout_line, verdict
from megatron_post.plan.hardware import GIB
from megatron_post.plan.outlook import Outlook
from megatron_post.plan.search import SearchResult, override
from megatron_post.plan.shape import model_parameters

if TYPE_CHECKING:
    from megatron_post.plan.dry_run import DryRun  # not at run time: it imports torch and megatron-core


def plan_json(outlook: Outlook) -> dict[str, Any]:
    """A plan as plain values for tools. Units are bytes and seconds, and shares are from 0 to 1."""
    plan, time = outlook.plan, outlook.plan.time
    return {
        "stage": plan.config.stage,
        "gpus": plan.gpus,
        "gpu": plan.gpu.name,
        "layout": {**plan.config.parallel.model_dump(), "data": plan.data_size},
        "recompute": plan.config.recompute.model_dump(),
        "precision": plan.config.precision.model_dump(),
        "parameters": model_parameters(plan.config),
        "segments": [segment.length for segment in plan.pack],
        "trained_share": plan.trained_share,
        "microbatches": plan.microbatches,
        "fits": plan.shortfall <= 0,
        "verdict": verdict(plan),
        "gpu_bytes": plan.gpu.memory,
        "memory": [
            {"pipeline_rank": r.pipeline_rank, "parameters": r.parameters, "bytes": r.total, "kinds": r.kinds}
            for r in plan.memory
        ],
        "seconds": time.seconds,
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "model_flops_utilization": plan.model_flops_utilization,
        "bubble": time.timeline.bubble,
        "time": time_rows(plan),
        "run": outlook.values,
        "notes": plan.notes,
    }


def time_rows(plan: Plan) -> dict[str, float]:
    """Seconds of a step by what the busiest pipeline rank does. They add up to the step."""
    time = plan.time
    rows = {
        "matrix multiplications": time.passes.matrices,
        "attention": time.passes.attention,
        "elementwise": time.passes.elementwise,
        "communication of layers": time.passes.communication,
        "waiting, busiest rank": time.timeline.seconds - time.passes.total,
        "gradient reduction": time.reduce_gradients,
        "parameter gathering": time.gather_parameters,
        "stragglers": time.stragglers,
        "optimizer": time.update,
        "frozen reference": time.reference,
    }
    return {name: seconds for name, seconds in rows.items() if seconds > 1e-6}


def print_plan(outlook: Outlook, console: Console) -> None:
    """Print layout, memory by rank and kind, time, the whole run, and the verdict."""
    plan, t = outlook.plan, outlook.plan.time
    console.print(
        f"{plan.config.stage}, {model_parameters(plan.config):,} parameters, {plan.gpus} x {plan.gpu.name}: "
        f"{layout_line(plan.config, plan.data_size)}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"{plan.microbatches} microbatches of {plan.config.data.pack_length:,} tokens a data-parallel rank, "
        f"{_segments(plan)}",
        highlight=False,
    )
    console.print(_memory_table(plan))
    table = Table("a step", "seconds", "share", box=None)
    for name, seconds in time_rows(plan).items():
        table.add_row(name, f"{seconds:.2f}", f"{seconds / t.seconds:.1%}")
    console.print(table)
    console.print(
        f"{t.seconds:.2f} s a step, {plan.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, MFU "
        f"{plan.model_flops_utilization:.1%} of the bf16 peak, "
        f"mean bubble {t.timeline.bubble:.1%}",
        highlight=False,
    )
    for text in (*outlook.lines, *plan.notes, verdict(plan)):
        console.print(text, highlight=False, soft_wrap=True)


def _segments(plan: Plan) -> str:
    lengths = [segment.length for segment in plan.pack]
    text = "one segment each"
    if len(lengths) > 1:
        text = f"{len(lengths)} segments of up to {max(lengths):,} each"
    return text if plan.config.traits.scalar_head else f"{text}, {plan.trained_share:.0%} trained"


def _memory_table(plan: Plan) -> Table:
    kinds = list(dict.fromkeys(kind for rank in plan.memory for kind in rank.kinds))
    table = Table("GiB of pipeline rank", *(str(rank.pipeline_rank) for rank in plan.memory), box=None)
    for kind in kinds:
        values = [rank.kinds.get(kind, 0) / GIB for rank in plan.memory]
        if max(values) >= 0.005:
            table.add_row(kind, *(f"{value:.2f}" for value in values))
    table.add_row("total", *(f"{rank.total / GIB:.2f}" for rank in plan.memory), style="bold")
    return table


def print_comparison(plans: dict[str, Plan], console: Console) -> None:
    """Print plans side by side. plans: by the name of their config."""
    table = Table("", *plans, box=None)
    outlooks = [Outlook(plan) for plan in plans.values()]
    rows: dict[str, list[str]] = {
        "GPUs": [f"{o.plan.gpus:,} x {o.plan.gpu.name}" for o in outlooks],
        "layout": [layout_line(o.plan.config, o.plan.data_size) for o in outlooks],
        "GiB of the fullest rank": [f"{o.plan.fullest.total / GIB:.1f}" for o in outlooks],
        "fits": ["yes" if o.plan.shortfall <= 0 else "no" for o in outlooks],
        "seconds a step": [f"{o.plan.time.seconds:.2f}" for o in outlooks],
        "tokens a step": [f"{o.plan.tokens:,}" for o in outlooks],
        "tokens/s/GPU": [f"{o.plan.tokens_per_second_per_gpu:,.0f}" for o in outlooks],
        "MFU": [f"{o.plan.model_flops_utilization:.1%}" for o in outlooks],
        "hours": [f"{o.hours:,.1f}" for o in outlooks],
        "GPU-hours": [f"{o.gpu_hours:,.0f}" for o in outlooks],
    }
    seconds = [time_rows(o.plan) for o in outlooks]
    for kind in dict.fromkeys(kind for found in seconds for kind in found):
        rows[f"s of {kind}"] = [f"{found.get(kind, 0.0):.2f}" for found in seconds]
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)


def print_search(found: SearchResult, console: Console) -> None:
    """Print the best layouts, and the winner as YAML."""
    console.print(
        f"{found.fitting:,} of {found.possible:,} possible layouts fit; tokens/s are of one GPU",
        highlight=False,
    )
    names = ("TP", "PP", "VPP", "CP", "DP", "recompute", "fp8", "GiB", "s a step", "tokens/s", "MFU")
    table = Table(*names, box=None)
    for plan in found.plans:
        p, r = plan.config.parallel, plan.config.recompute
        recompute = "+".join(r.modules) if r.mode == "selective" else r.mode
        sizes = (p.tensor, p.pipeline, p.virtual_pipeline, p.context, plan.data_size)
        table.add_row(
            *map(str, sizes),
            recompute,
            plan.config.precision.fp8 or "no",
            f"{plan.fullest.total / GIB:.1f}",
            f"{plan.time.seconds:.2f}",
            f"{plan.tokens_per_second_per_gpu:,.0f}",
            f"{plan.model_flops_utilization:.1%}",
        )
    console.print(table)
    console.print("# the fastest layout, as overrides of the config")
    console.print(write_yaml(override(found.plans[0])), highlight=False, end="")


def search_json(found: SearchResult) -> dict[str, Any]:
    """A search as plain values for tools: the plans, best first, and the winner's YAML."""
    return {
        "possible": found.possible,
        "fitting": found.fitting,
        "plans": [plan_json(Outlook(plan)) for plan in found.plans],
        "override": write_yaml(override(found.plans[0])),
    }


def winner_config(found: SearchResult, config: str, overrides: Sequence[str]) -> str:
    """YAML of the config that was searched for, with the fastest layout. config: its path."""
    return write_yaml(merged(with_overrides(read_tree(config), overrides), override(found.plans[0])))


def print_dry_run(found: "DryRun", console: Console) -> None:
    """Print the groups, and the layers, parameters and collectives of each stage."""
    console.print(
        f"{found.model_parameters:,} parameters; {found.world_size:,} ranks, each in one group of:",
        highlight=False,
    )
    for axis, (count, size) in found.groups.items():
        console.print(f"  {axis}: {count:,} groups of {size}", highlight=False)
    table = Table(
        "stage", "rank", "layers", "parameters", "collectives of one pack, forward and backward", box=None
    )
    for stage in found.stages:
        calls = "\n".join(
            f"{calls} x {name} ({axis}), {size / 1e9:.2f} GB" for name, axis, calls, size in stage.collectives
        )
        layers = "+".join(map(str, stage.layers))
        table.add_row(
            str(stage.pipeline_rank), str(stage.rank), layers, f"{stage.parameters:,}", calls or "none"
        )
    console.print(table)
    console.print(f"built and traced in {found.seconds:.1f} s", highlight=False)


def dry_run_json(found: "DryRun") -> dict[str, Any]:
    """A dry run as plain values for tools."""
    return dataclasses.asdict(found)
