"""The options and the output of `megatron-post bench`."""

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
Output = Annotated[str, typer.Option(help="Directory in which the record is written.")]
ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
Disk = Annotated[str, typer.Option(help="Directory on the disk to measure.")]


@bench_app.callback()
def bench() -> None:
    """Measure, write a record, and compare records."""
    # sys.exit runs the cleanup that removes gigabytes of scratch files. The default action of SIGTERM would
    # leave them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@bench_app.command("step")
def step(
    config: ConfigPath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Steps to measure.")] = 20,
    warmup: Annotated[int, typer.Option(help="Steps to warm up.")] = 3,
    proxy_rank: Annotated[
        int | None, typer.Option(help="Run only this rank of --world, in one process without communication.")
    ] = None,
    world: Annotated[int | None, typer.Option(help="Ranks of the layout. By default the fewest.")] = None,
    proxy_layers: Annotated[
        int | None, typer.Option(help="Layers of each pipeline rank, instead of the model's.")
    ] = None,
    output: Output = OUTPUT,
) -> None:
    """Time real training steps. Run it under torchrun for many ranks."""
    from megatron_post.config.load import load_config

    loaded = load_config(config, overrides or ())
    if proxy_rank is not None:
        from megatron_post.bench.proxy import PROXY_WARNING, measure_proxy

        say(PROXY_WARNING)
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
            "--world and --proxy-layers describe a proxy; give --proxy-rank as well, or none of them"
        )
    from megatron_post.bench.step import measure_steps
    from megatron_post.bench.step_figures import step_record

    measured = measure_steps(loaded, steps=steps, warmup=warmup)
    if measured is not None:
        _show(step_record(measured, warmup=warmup, origin=config, overrides=overrides or ()), output)


@bench_app.command("data")
def data(
    rounds: Annotated[int, typer.Option(help="Times that each figure is measured.")] = 6,
    output: Output = OUTPUT,
) -> None:
    """Measure packing and the loader on one core."""
    from megatron_post.bench.data import measure_data

    _show(measure_data(rounds=rounds), output)


@bench_app.command("balance")
def balance() -> None:
    """Show how evenly packs are spread over ranks and microbatches. This is computed and writes no record."""
    from megatron_post.bench.balance import balance_table

    make_console().print(balance_table())


@bench_app.command("trl")
def trl(
    threads: Annotated[int, typer.Option(help="torch threads of each trainer")] = 1,
    rounds: Annotated[int, typer.Option(help="rounds of each trainer, in turn")] = 9,
    steps: Annotated[int, typer.Option(help="optimizer steps in a round")] = 3,
    pair_rounds: Annotated[int, typer.Option(help="rounds of DPO, each one step over all pairs")] = 3,
    output: Output = OUTPUT,
) -> None:
    """Measure training steps and DPO beside TRL's SFTTrainer and DPOTrainer, on the CPU."""
    from megatron_post.bench.trl.steps import measure_beside_trl

    _quiet()
    for table, record in measure_beside_trl(
        threads=threads, rounds=rounds, steps=steps, pair_rounds=pair_rounds
    ):
        _write(table, record, output)


@bench_app.command("kernels")
def kernels(output: Output = OUTPUT) -> None:
    """Run kernels/benchmarks on a GPU. Without a GPU, print what cannot be measured."""
    import torch

    from megatron_post.bench.kernels import measure_kernels, without_gpu

    if torch.cuda.is_available():
        _show(measure_kernels(), output)
    else:
        say(without_gpu())


@bench_app.command("convert")
def convert(
    model: Annotated[
        list[str] | None, typer.Option(help="May be repeated. By default the small models.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="rounds, in turn with cp")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="processes that convert")] = 1,
    directory: Disk = OUTPUT,
    output: Output = OUTPUT,
) -> None:
    """Measure conversion of synthetic models both ways beside `cp`: speed and peak memory."""
    from megatron_post.bench import convert as bench

    with _scratch(directory) as disk:
        figures = bench.measure_conversions(
            disk, names=tuple(model or bench.SMALL), rounds=rounds, workers=workers
        )
    table = bench.conversion_table(figures, workers=workers)
    _write(table, bench.conversion_record(figures, workers=workers), output)


@bench_app.command("merge")
def merge(
    gigabytes: Annotated[list[int] | None, typer.Option(help="1, 2 or 4. May be repeated.")] = None,
    directory: Disk = OUTPUT,
    output: Output = OUTPUT,
) -> None:
    """Measure merging of synthetic models beside `cp`: speed and peak memory."""
    from megatron_post.bench.merge import measure_merges, merge_record, merge_table

    with _scratch(directory) as disk:
        figures = [figure for size in gigabytes or [1] for figure in measure_merges(disk, size)]
    _write(merge_table(figures), merge_record(figures), output)


@bench_app.command("curation")
def curation(
    rows: Annotated[int, typer.Option(help="Synthetic rows.")] = 100_000,
    words: Annotated[int, typer.Option(help="Words of a row.")] = 300,
    processes: Annotated[int, typer.Option(help="Processes of each side, with one thread each.")] = 2,
    directory: Disk = OUTPUT,
    output: Output = OUTPUT,
) -> None:
    """Measure the steps of `curate` that find duplicates, beside datatrove's MinHash."""
    from megatron_post.bench.curation import side_by_side as bench

    with _scratch(directory) as disk:
        figures = bench.measure_side_by_side(disk, rows=rows, words=words, processes=processes)
    _write(bench.curation_table(figures), bench.curation_record(figures), output)


@bench_app.command("pack")
def pack(
    rows: Annotated[list[int] | None, typer.Option(help="May be repeated. Default: 10000, 100000.")] = None,
    workers: Annotated[list[int] | None, typer.Option(help="May be repeated. Default: 1, 2.")] = None,
    rounds: Annotated[int, typer.Option(help="rounds of both sides, shuffled")] = 3,
    directory: Disk = OUTPUT,
    output: Output = OUTPUT,
) -> None:
    """Measure `data pack` beside `datasets.map` with TRL's packing: speed and peak memory."""
    from megatron_post.bench.trl import packing as bench

    _quiet()
    with _scratch(directory) as disk:
        found = bench.measure_packing(
            disk, rows=rows or [10_000, 100_000], workers=workers or [1, 2], rounds=rounds
        )
    _write(bench.packing_table(found), bench.packing_record(found), output)


@bench_app.command("checkpoint")
def checkpoint(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]", help="default: 56M parameters")] = "",
    overrides: Overrides = None,
    saves: Annotated[int, typer.Option(help="saves of each kind in a round")] = 3,
    every: Annotated[int, typer.Option(help="steps from one save to the next")] = 3,
    rounds: Annotated[int, typer.Option(help="rounds of both kinds")] = 2,
    directory: Disk = OUTPUT,
    output: Output = OUTPUT,
) -> None:
    """Measure how long synchronous and asynchronous saves hold up training.

    Run it under torchrun for many ranks.
    """
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
    html: Annotated[str, typer.Option(help="Page to write. By default report.html in DIR.")] = "",
) -> None:
    """Compare the runs in a directory on one HTML page, and print which figures changed."""
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
    """Print a benchmark's own table and write the record."""
    from megatron_post.bench.record import write_record

    make_console().print(table)
    say(f"written to {write_record(output, record)}")


@contextlib.contextmanager
def _scratch(directory: str) -> Iterator[Path]:
    """A temporary directory in `directory`. It is removed when this context ends."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        yield Path(name)


def _quiet() -> None:
    """Hide the warnings of this process and of those that it starts."""
    warnings.filterwarnings("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"
