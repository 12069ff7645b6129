"""`megatron-post bench`: its options, and what it prints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_post.bench.record import Record

bench_app = typer.Typer(no_args_is_help=True, help="Measure, write a record, and compare records.")
Output = Annotated[str, typer.Option(help="Directory of the record that is written.")]
OUTPUT = "runs/bench"
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]


@bench_app.command("step")
def step(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Steps that are measured.")] = 20,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 3,
    output: Output = OUTPUT,
) -> None:
    """Time real training steps; under torchrun on many ranks."""
    from megatron_post.bench.step import measure_steps
    from megatron_post.bench.step_figures import step_record
    from megatron_post.config.load import load_config

    measured = measure_steps(load_config(config, overrides or ()), steps=steps, warmup=warmup)
    if measured is not None:
        _finish(step_record(measured, warmup=warmup, origin=config, overrides=overrides or ()), output)


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
    target.write_text(page(records))
    print("\n".join([*summary(records), f"{len(records)} records on {target}"]))


def _finish(record: "Record", output: str) -> None:
    """Print a record and write it."""
    from rich.console import Console

    from megatron_post.bench.record import write_record
    from megatron_post.bench.tables import print_record

    print_record(record, Console())
    print(f"written to {write_record(output, record)}")
