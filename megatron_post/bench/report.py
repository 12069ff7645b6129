"""The tables of `make bench`."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from megatron_post.bench.data import Packed
from megatron_post.bench.train_step import StepFigures
from megatron_post.bench.workload import Workload


def data_table(packed: Packed, *, capacity: int, loaders: dict[int, float]) -> Table:
    """loaders: pack length -> tokens/s."""
    table = Table("data, on one core", "", box=SIMPLE)
    table.add_row(f"packing {packed.units:,} lengths at {capacity:,}", f"{packed.seconds:.2f} s")
    table.add_row(f"fill of the {packed.packs:,} packs", f"{packed.fill:.2%}")
    for length, speed in loaders.items():
        table.add_row(f"loader, packs of {length:,}", f"{speed / 1e6:,.0f}M tokens/s")
    return table


def step_table(workload: Workload, figures: Sequence[StepFigures], *, rounds: int) -> Table:
    """One row a side. "ours / theirs" compares trained tokens/s round by round."""
    config = workload.config
    title = (
        f"training steps: {config.model.preset} on {workload.data_name}, {config.precision.dtype}, threads: "
        f"{workload.threads}\n{config.train.global_batch} x {config.data.pack_length} tokens a step; medians "
        f"of {rounds} interleaved rounds of {workload.steps_per_round} steps"
    )
    table = Table(box=SIMPLE, pad_edge=False, title=title, title_justify="left", title_style="")
    for name in ("", "tokens/s", "trained/s", "ours/theirs", "fill", "collated/s", "loss"):
        table.add_column(name, no_wrap=True, justify="right" if name else "left")
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
