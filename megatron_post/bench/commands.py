"""`megatron-post bench`: its options, and what it prints."""

import contextlib
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_post.display import make_console, say
from megatron_post.storage.writing import write_text

if TYPE_CHECKING:
    from megatron_post.bench.record import Record

bench_app = typer.Typer(no_args_is_help=True)
OUTPUT = "runs/bench"
Output = Annotated[str, typer.Option(help="Directory of the record that is written.")]
ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
Disk = Annotated[str, typer.Option(help="Directory on the disk that is measured.")]


@bench_app.callback()
def bench() -> None:
    """Measure, write a record, and compare records."""
    # gigabytes of scratch files go with the process, also where it is asked to end
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@bench_app.command("step")
def step(
    config: ConfigPath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Steps that are measured.")] = 20,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 3,
    proxy_rank: Annotated[
        int | None, typer.Option(help="Stand in, alone, for this rank of --world: compute only.")
    ] = None,
    world: Annotated[int | None, typer.Option(help="Ranks of its layout; by default the fewest.")] = None,
    proxy_layers: Annotated[
        int | None, typer.Option(help="Layers of each pipeline rank, in place of the model's.")
    ] = None,
    output: Output = OUTPUT,
) -> None:
    """Time real training steps; under torchrun on many ranks."""
    from megatron_post.config.load import load_config

    loaded = load_config(config, overrides or ())
    if proxy_rank is not None:
        from megatron_post.bench.proxy import LOUD, measure_proxy

        say(LOUD)
        record = measure_proxy(
            loaded,
            origin=config,
            rank=proxy_rank,
            world_size=world or loaded.parallel.model_size,
            layers=proxy_layers,
            steps=steps,
            warmup=warmup,
        )
        _show(record, output)
        return
    if world is not None or proxy_layers is not None:
        raise ValueError(
            "--world and --proxy-layers describe a proxy: give --proxy-rank as well, or none of them"
        )
    from megatron_post.bench.step import measure_steps
    from megatron_post.bench.step_figures import step_record

    measured = measure_steps(loaded, steps=steps, warmup=warmup)
    if measured is not None:
        _show(step_record(measured, warmup=warmup, origin=config, overrides=overrides or ()), output)


@bench_app.command("data")
def data(
    rounds: Annotated[int, typer.Option(help="Times that each figure is taken.")] = 6,
    output: Output = OUTPUT,
) -> None:
    """Packing and the loader, on one core."""
    from megatron_post.bench.data import measure_data

    _show(measure_data(rounds=rounds), output)


@bench_app.command("balance")
def balance() -> None:
    """How evenly a step's packs are spread over ranks and microbatches: arithmetic, no record."""
    from megatron_post.bench.balance import balance_table

    make_console().print(balance_table())


@bench_app.command("trl")
def trl(
    threads: Annotated[int, typer.Option(help="torch threads of every side")] = 1,
    rounds: Annotated[int, typer.Option(help="rounds of every side, in turn")] = 9,
    steps: Annotated[int, typer.Option(help="optimizer steps a round")] = 3,
    pair_rounds: Annotated[int, typer.Option(help="rounds of DPO, of one step over all pairs")] = 3,
    output: Output = OUTPUT,
) -> None:
    """Training steps and DPO beside TRL's SFTTrainer and DPOTrainer, on the CPU."""
    from megatron_post.bench.trl.steps import measure_beside_trl

    _quiet()
    for table, record in measure_beside_trl(
        threads=threads, rounds=rounds, steps=steps, pair_rounds=pair_rounds
    ):
        _write(table, record, output)


@bench_app.command("kernels")
def kernels(output: Output = OUTPUT) -> None:
    """kernels/benchmarks on a GPU; without one, what cannot be measured."""
    import torch

    from megatron_post.bench.kernels import measure_kernels, without_gpu

    if torch.cuda.is_available():
        _show(measure_kernels(), output)
    else:
        say(without_gpu())


@bench_app.command("convert")
def convert(
    model: Annotated[list[str] | None, typer.Option(help="May be given again; by default the small.")] = None,
    rounds: Annotated[int, typer.Option(help="rounds, in turn with cp")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="processes that convert")] = 1,
    directory: Disk = OUTPUT,
    output: Output = OUTPUT,
) -> None:
    """Conversion of synthetic models both ways beside `cp`: speed, and peak memory."""
    from megatron_post.bench import convert as bench

    with _scratch(directory) as disk:
        figures = bench.measure_conversions(
            disk, names=tuple(model or bench.SMALL), rounds=rounds, workers=workers
        )
    table = bench.conversion_table(figures, workers=workers)
    _write(table, bench.conversion_record(figures, workers=workers), output)


@bench_app.command("merge")
def merge(
    gigabytes: Annotated[list[int] | None, typer.Option(help="1, 2 or 4; may be given again.")] = None,
    directory: Disk = OUTPUT,
    output: Output = OUTPUT,
) -> None:
    """Merging of synthetic models beside `cp`: speed, and peak memory."""
    from megatron_post.bench.merge import measure_merges, merge_record, merge_table

    with _scratch(directory) as disk:
        figures = [figure for size in gigabytes or [1] for figure in measure_merges(disk, size)]
    _write(merge_table(figures), merge_record(figures), output)


@bench_app.command("checkpoint")
def checkpoint(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]", help="default: 56M parameters")] = "",
    overrides: Overrides = None,
    saves: Annotated[int, typer.Option(help="saves of each kind a round")] = 3,
    every: Annotated[int, typer.Option(help="steps from one save to the next")] = 3,
    rounds: Annotated[int, typer.Option(help="rounds of both kinds")] = 2,
    directory: Disk = OUTPUT,
    output: Output = OUTPUT,
) -> None:
    """How long synchronous and asynchronous saves hold up training; under torchrun on many ranks."""
    from megatron_post.bench.checkpoint import default_config, measure_checkpoints
    from megatron_post.config.load import load_config

    record = measure_checkpoints(
        load_config(config, overrides or ()) if config else default_config(),
        subject=config or "56M parameters",
        directory=directory,
        saves=saves,
        every=every,
        rounds=rounds,
    )
    if record is not None:
        _show(record, output)


@bench_app.command("report")
def report(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="directory of records")] = OUTPUT,
    html: Annotated[str, typer.Option(help="Page to write; by default report.html in DIR.")] = "",
) -> None:
    """Compare the runs in a directory on one HTML page, and say which changed."""
    from megatron_post.bench.compare import summary
    from megatron_post.bench.page import page
    from megatron_post.bench.record import read_records

    records = read_records(directory)
    target = Path(html) if html else Path(directory) / "report.html"
    write_text(target, page(records))
    say("\n".join([*summary(records), f"{len(records)} records on {target}"]))


def _show(record: "Record", output: str) -> None:
    """Print a record and write it."""
    from megatron_post.bench.record import write_record
    from megatron_post.bench.tables import print_record

    print_record(record, make_console())
    say(f"written to {write_record(output, record)}")


def _write(table: Any, record: "Record", output: str) -> None:
    """Print a table of its own and write the record."""
    from megatron_post.bench.record import write_record

    make_console().print(table)
    say(f"written to {write_record(output, record)}")


@contextlib.contextmanager
def _scratch(directory: str) -> Iterator[Path]:
    """A directory in `directory`, removed when this context ends."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        yield Path(name)


def _quiet() -> None:
    """No warnings, of this process nor of those that it starts."""
    warnings.filterwarnings("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"
