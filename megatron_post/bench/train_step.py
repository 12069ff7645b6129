"""Training steps of both sides, from interleaved rounds."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from megatron_post.bench.contender import Contender, Input, Round, interleave
from megatron_post.bench.ours import train_ours
from megatron_post.bench.peer import trl_packed, trl_padded
from megatron_post.bench.workload import Workload

OURS = "Megatron-Post"


@dataclass(frozen=True)
class StepFigures:
    """One side: medians over its rounds.

    speed: median over rounds of our trained tokens/s divided by this side's in the same round.
    """

    name: str
    fill: float
    collated_per_second: float
    tokens_per_second: float
    trained_per_second: float
    loss: float
    speed: float


def contenders() -> dict[str, Contender]:
    """Who runs. Raises `ValueError` where TRL is not installed."""
    if importlib.util.find_spec("trl") is None:
        raise ValueError(
            "trl is not installed, and there is nothing to measure beside: pip install -e '.[bench]'"
        )
    return {OURS: train_ours, "TRL, packing": trl_packed(), "TRL, padding": trl_padded()}


def measure(workload: Workload, sides: dict[str, Contender], *, rounds: int) -> list[StepFigures]:
    """Every side's figures, ours first."""
    inputs, results = interleave(sides, workload, rounds=rounds)
    return [summarise(name, inputs[name], results[name], ours=results[OURS]) for name in sides]


def summarise(name: str, prepared: Input, rounds: Sequence[Round], *, ours: Sequence[Round]) -> StepFigures:
    """Medians of one side; `ours` are our rounds, played in the same order."""
    speeds = [
        (own.trained / own.seconds) / (other.trained / other.seconds)
        for own, other in zip(ours, rounds, strict=True)
    ]
    return StepFigures(
        name=name,
        fill=prepared.fill,
        collated_per_second=prepared.collated_per_second,
        tokens_per_second=median(r.tokens / r.seconds for r in rounds),
        trained_per_second=median(r.trained / r.seconds for r in rounds),
        loss=rounds[-1].loss,
        speed=median(speeds),
    )
