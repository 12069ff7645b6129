"""Measures training steps beside TRL's, in interleaved rounds."""

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from megatron_post.bench.record import Record
from megatron_post.bench.tables import titled
from megatron_post.bench.trl.figures import MEGATRON_POST, StepFigures, side_record, summarise
from megatron_post.bench.trl.own_side import train_megatron_post
from megatron_post.bench.trl.preferences import measure_pairs, pair_table, pair_workload
from megatron_post.bench.trl.side import Side, interleave
from megatron_post.bench.trl.trl_side import trl_packed, trl_padded
from megatron_post.bench.trl.workload import Workload, make_workload
from megatron_post.installation import install_command


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
