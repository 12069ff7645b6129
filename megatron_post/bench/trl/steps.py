"""Measures training steps beside TRL's, in interleaved rounds."""

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from megatron_post.bench.environment import environment
from megatron_post.bench.record import Figure, Record, once
from megatron_post.bench.tables import titled
from megatron_post.bench.trl.own_side import train_megatron_post
from megatron_post.bench.trl.side import Input, Round, Side, interleave
from megatron_post.bench.trl.trl_side import trl_packed, trl_padded
from megatron_post.bench.trl.workload import Workload, make_workload
from megatron_post.installation import install_command

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


def all_sides() -> dict[str, Side]:
    """The sides of the comparison by name. Raises `ValueError` if TRL is not installed."""
    if importlib.util.find_spec("trl") is None:
        raise ValueError(
            f"trl is not installed, so there is nothing to compare with; run: {install_command('bench')}"
        )
    return {MEGATRON_POST: train_megatron_post, "TRL, packing": trl_packed(), "TRL, padding": trl_padded()}


def measure_beside_trl(
    *, threads: int, rounds: int, steps: int, pair_rounds: int
) -> Iterator[tuple[Table, Record]]:
    """Measure SFT, then DPO. Yields a table and a record of each as soon as it is measured.

    Raises `ValueError` if TRL is not installed, and for counts that give no measurement.
    """
    from megatron_post.bench.trl.preferences import measure_pairs, pair_table, pair_workload

    if min(threads, rounds, steps, pair_rounds) < 1:
        raise ValueError("--threads, --rounds, --steps, --pair-rounds: want at least 1 of each")
    sides = all_sides()
    with tempfile.TemporaryDirectory() as directory:
        workload = make_workload(Path(directory), threads=threads, steps_per_round=steps)
        figures = measure(workload, sides, rounds=rounds)
        record = side_record("steps beside TRL", workload, figures, unit="trained tokens/s")
        yield step_table(workload, figures, rounds=rounds), record
        preferences = pair_workload(workload, Path(directory, "pairs"))
        figures = measure_pairs(preferences, rounds=pair_rounds)
        record = side_record("DPO beside TRL", preferences, figures, unit="pairs/s")
        yield pair_table(preferences, figures, rounds=pair_rounds), record


def measure(workload: Workload, sides: dict[str, Side], *, rounds: int) -> list[StepFigures]:
    """The figures of every side, Megatron-Post first."""
    inputs, results = interleave(sides, workload, rounds=rounds)
    return [summarise(name, inputs[name], results[name], own_rounds=results[MEGATRON_POST]) for name in sides]


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


def step_table(workload: Workload, figures: Sequence[StepFigures], *, rounds: int) -> Table:
    """A table with a row for each side.

    The speedup is the trained tokens/s of Megatron-Post divided by this side's, round by round.
    """
    config = workload.config
    title = (
        f"training steps: {config.model.preset} on {workload.data_name}, {config.precision.dtype}, threads: "
        f"{workload.threads}\n{config.train.global_batch} x {config.data.pack_length} tokens a step; medians "
        f"of {rounds} interleaved rounds of {workload.steps_per_round} steps\n"
        f"speedup: trained/s of {MEGATRON_POST} divided by this side's"
    )
    table = titled(title, ("", "tokens/s", "trained/s", "speedup", "fill", "collated/s", "loss"))
    for side in figures:
        table.add_row(
            side.name,
            f"{side.tokens_per_second:,.0f}",
            f"{side.trained_per_second:,.0f}",
            f"{side.speed:.2f}",
            f"{side.fill:.1%}",
            f"{side.collated_per_second / 1e6:.2f}M",
            f"{side.loss:.2f}",
        )
    return table


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
