"""The figures of a comparison with TRL, and its record."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from megatron_post.bench.environment import environment
from megatron_post.bench.record import Figure, Record, once
from megatron_post.bench.trl.side import Input, Round
from megatron_post.bench.trl.workload import Workload

MEGATRON_POST = "Megatron-Post"  # the side that the others are compared with


@dataclass(frozen=True)
class StepFigures:
    """One side: medians over its rounds.

    speed: the median over rounds of Megatron-Post's trained tokens/s divided by this side's in the same
    round. rates, ratios: trained tokens/s and that quotient, of each round.
    """

    name: str
    fill: float
    collated_per_second: float
    tokens_per_second: float
    trained_per_second: float
    loss: float
    speed: float
    rates: tuple[float, ...]
    ratios: tuple[float, ...]


def summarise(
    name: str, prepared: Input, rounds: Sequence[Round], *, own_rounds: Sequence[Round]
) -> StepFigures:
    """Medians of one side. own_rounds: the rounds of Megatron-Post, in the same order."""
    speeds = [
        (own.trained / own.seconds) / (other.trained / other.seconds)
        for own, other in zip(own_rounds, rounds, strict=True)
    ]
    return StepFigures(
        name=name,
        fill=prepared.fill,
        collated_per_second=prepared.collated_per_second,
        tokens_per_second=median(r.tokens / r.seconds for r in rounds),
        trained_per_second=median(r.trained / r.seconds for r in rounds),
        loss=rounds[-1].loss,
        speed=median(speeds),
        rates=tuple(r.trained / r.seconds for r in rounds),
        ratios=tuple(speeds),
    )


def side_record(benchmark: str, workload: Workload, sides: Sequence[StepFigures], *, unit: str) -> Record:
    """The record with the rounds of each side.

    unit: the rate that a round counts, "trained tokens/s" or "pairs/s".
    """
    config, figures = workload.config, {}
    for side in sides:
        figures[f"{side.name}: {unit}"] = Figure("1/s", side.rates, "higher")
        if side.ratios != (1.0,) * len(side.ratios):
            figures[f"{MEGATRON_POST} / {side.name}"] = Figure("x", side.ratios, "higher")
        figures[f"{side.name}: fill"] = once("%", 100 * side.fill, "higher")
    return Record(
        benchmark=benchmark,
        subject=f"{config.model.preset} on {workload.data_name}",
        settings={
            "batch": f"{config.train.global_batch} packs of {config.data.pack_length:,} tokens",
            "dtype": config.precision.dtype,
            "threads": str(workload.threads),
            "rounds": f"{len(sides[0].rates)} of {workload.steps_per_round} steps, sides in turn",
        },
        figures=figures,
        environment=environment(),
    )
