"""`python -m megatron_post.bench`: every figure of `make bench`."""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

CAPACITY = 131072


def main(
    threads: Annotated[int, typer.Option(help="torch threads of every side")] = 1,
    rounds: Annotated[int, typer.Option(help="rounds of every side, in turn")] = 9,
    steps: Annotated[int, typer.Option(help="optimizer steps a round")] = 3,
    pair_rounds: Annotated[int, typer.Option(help="rounds of DPO, of one step over all pairs")] = 3,
) -> None:
    """Print packing, loader and training-step figures, the last beside TRL's SFTTrainer and DPOTrainer."""
    from megatron_post.bench.data import long_tailed_lengths, time_loader, time_packing
    from megatron_post.bench.preferences import measure_pairs, pair_table, pair_workload
    from megatron_post.bench.report import data_table, step_table
    from megatron_post.bench.train_step import contenders, measure
    from megatron_post.bench.workload import make_workload

    console = Console()
    packed = time_packing(long_tailed_lengths(1_000_000, capacity=CAPACITY), capacity=CAPACITY)
    with tempfile.TemporaryDirectory() as directory:
        lengths = (8192, CAPACITY)
        loaders = {n: time_loader(Path(directory, str(n)), pack_length=n, tokens=2**25) for n in lengths}
        console.print(data_table(packed, capacity=CAPACITY, loaders=loaders))
        workload = make_workload(Path(directory), threads=threads, steps_per_round=steps)
        figures = measure(workload, contenders(), rounds=rounds)
        console.print(step_table(workload, figures, rounds=rounds))
        preferences = pair_workload(workload, Path(directory, "pairs"))
        figures = measure_pairs(preferences, rounds=pair_rounds)
        console.print(pair_table(preferences, figures, rounds=pair_rounds))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"  # of the sides' processes, too
    try:
        typer.run(main)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
