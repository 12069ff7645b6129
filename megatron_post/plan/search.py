"""Ranks all possible layouts of a config on a number of GPUs.

A closed form ranks them, and the best are simulated. A microbatch is always one pack, so the size of a
microbatch is `data.pack_length` and is not searched.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_post.config.fp8 import device_errors
from megatron_post.config.layout import world_errors
from megatron_post.config.load import ConfigError, parse, raise_for
from megatron_post.config.schema import Config
from megatron_post.config.sections import Precision
from megatron_post.plan.estimate import Plan, changed, layout_line, verdict
from megatron_post.plan.hardware import GPU
from megatron_post.plan.shape import chunks
from megatron_post.plan.step import around_the_pipeline

# (mode, modules), from the least additional time to the most saved memory
RECOMPUTE = (("none", ["core_attn"]), ("selective", ["core_attn"]), ("selective", ["core_attn", "mlp"]),
             ("full", ["core_attn"]))  # fmt: skip


@dataclass(frozen=True)
class SearchResult:
    """Plans that fit, best first, and the numbers of layouts that are possible and that fit."""

    plans: list[Plan]
    possible: int
    fitting: int


def search(
    config: Config,
    *,
    gpus: int,
    gpu: GPU,
    segment_length: int | None = None,
    trained_share: float = 1.0,
    fp8: str | None = None,
    keep: int = 10,
) -> SearchResult:
    """The fastest layouts that fit. fp8: a recipe to try as well as the config's own and none.

    Raises `ConfigError` for an unknown recipe, for a recipe that the GPU does not have, and if no layout
    fits. In the last case the message has the layout that is closest. Raises `ValueError` for a wrong share.
    """
    precision = parse(Precision, {"fp8": fp8}, origin="--fp8")
    for asked in (config, config.model_copy(update={"precision": precision})):
        raise_for(device_errors(asked, capability=gpu.capability, cuda=None))
    fitting: list[tuple[float, Plan]] = []
    closest: Plan | None = None
    possible = 0
    for layout in _layouts(config, gpus=gpus, per_node=gpu.per_node):
        for mode, modules in RECOMPUTE:
            for recipe in dict.fromkeys((layout.precision.fp8, None, fp8)):
                change: dict[str, Any] = {"recompute.mode": mode, "recompute.modules": modules}
                change["precision.fp8"] = recipe
                if recipe != layout.precision.fp8:
                    change["precision.fp8_param_gather"] = False
                candidate = changed(layout, change)
                if candidate is None:
                    continue
                possible += 1
                plan = Plan(candidate, gpus, gpu, segment_length, trained_share)
                if plan.shortfall <= 0:
                    fitting.append((closed_form_seconds(plan), plan))
                elif closest is None or plan.shortfall < closest.shortfall:
                    closest = plan
    if not fitting:
        raise ConfigError(_no_layout_message(config, gpus, gpu, possible, closest))
    fitting.sort(key=lambda item: item[0])
    best = sorted((plan for _, plan in fitting[: 2 * keep]), key=lambda plan: plan.time.seconds)
    return SearchResult(best[:keep], possible, len(fitting))


def closed_form_seconds(plan: Plan) -> float:
    """Seconds of a step by a closed form.

    It adds the busiest rank's passes, a bubble of p - 1 chunks, and the time outside the pipeline.
    """
    p, costs, parts = plan.config.parallel, plan.costs, chunks(plan.config)

    def pipeline(*kinds: str) -> tuple[float, float]:
        """Seconds that the busiest rank computes, without and with the bubble."""
        table = {
            (c.layers, c.embedding, c.head): sum(costs.chunk(c, plan.pack, kind).total for kind in kinds)
            for rank in parts
            for c in rank
        }
        each = [sum(table[c.layers, c.embedding, c.head] for c in rank) for rank in parts]
        busy = plan.microbatches * max(each)
        return busy, busy + (p.pipeline - 1) * sum(each) / len(each) / p.virtual_pipeline

    passes, seconds = pipeline("forward", "backward")
    seconds += sum(around_the_pipeline(costs, parts, passes=passes, microbatches=plan.microbatches))
    return seconds + pipeline("forward")[1] if plan.config.runs_reference else seconds


def _layouts(config: Config, *, gpus: int, per_node: int) -> Iterator[Config]:
    """Every way to divide the model and its packs over the GPUs."""
    for tensor in _divisors(per_node):
        for pipeline in _divisors(gpus // tensor if gpus % tensor == 0 else 1):
            for context in _divisors(gpus // tensor // pipeline):
                for virtual in range(1, config.model.num_layers // pipeline + 2) if pipeline > 1 else (1,):
                    layout = _layout(config, tensor, pipeline, virtual, context)
                    if layout is not None and not world_errors(
                        layout, world_size=gpus, has_gpu=True, has_transformer_engine=True
                    ):
                        yield layout


def _layout(config: Config, tensor: int, pipeline: int, virtual: int, context: int) -> Config | None:
    layers, parts = config.model.num_layers, pipeline * virtual
    if layers % parts and (layers + 2) % parts:
        return None
    change: dict[str, Any] = {
        "parallel.tensor": tensor,
        "parallel.sequence": tensor > 1,
        "parallel.pipeline": pipeline,
        "parallel.virtual_pipeline": virtual,
        "parallel.context": context,
        "parallel.embedding_and_loss_as_layers": layers % parts != 0,
    }
    return changed(config, change)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def override(plan: Plan) -> dict[str, Any]:
    """The layout as sections that override those of the config."""
    c = plan.config
    return {
        "parallel": c.parallel.model_dump(),
        "precision": {"fp8": c.precision.fp8, "fp8_param_gather": c.precision.fp8_param_gather},
        "recompute": {"mode": c.recompute.mode, "modules": list(c.recompute.modules)},
    }


def _no_layout_message(config: Config, gpus: int, gpu: GPU, possible: int, closest: Plan | None) -> str:
    if closest is None:
        return (
            f"no layout of model.num_layers={config.model.num_layers}, train.global_batch="
            f"{config.train.global_batch} and data.pack_length={config.data.pack_length} is possible on "
            f"{gpus} GPUs; change the number of GPUs or train.global_batch"
        )
    return (
        f"none of {possible} layouts fits on {gpus} x {gpu.name}. The closest: "
        f"{layout_line(closest.config, closest.data_size)}\n{verdict(closest, search=False)}"
    )
