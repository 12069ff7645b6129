"""The commands of `megatron-post curate`, with their options and their output."""

import os
from typing import Annotated

import typer

from megatron_post.display import make_console
from megatron_post.plan.commands import with_default

curate_app = typer.Typer(
    cls=with_default("run"),
    no_args_is_help=True,
    help="Find the rows that are worth training on: `curate FILE`.",
)


@curate_app.command("run")
def run(
    config: Annotated[str, typer.Argument(metavar="FILE", help="YAML: sources, steps, models, run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    rank: Annotated[
        int | None, typer.Option(help="Number of this process, from 0; by default that of a Slurm array.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Processes that share the rows; by default those of a Slurm array.")
    ] = None,
) -> None:
    """Annotate the rows step by step, and write those that every step keeps. The same command resumes.

    The word `run` may be left out.
    """
    from megatron_post.curation.run import curate
    from megatron_post.curation.settings import load_curation
    from megatron_post.parallel.environment import share_of

    settings = load_curation(config, overrides or ())
    rank, size = share_of(rank, size, os.environ)
    curate(settings, rank=rank, size=size, console=make_console())


@curate_app.command("show")
def show(
    directory: Annotated[str, typer.Argument(metavar="RUN", help="directory of a finished run")],
    topic: Annotated[str | None, typer.Option(help="Only rows with this coarse or fine label.")] = None,
    source: Annotated[str | None, typer.Option(help="Only rows of this source.")] = None,
    dropped_by: Annotated[str | None, typer.Option(help="Rows that this step has dropped.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Largest number of rows.")] = 10,
) -> None:
    """Print rows with their annotations. Without --dropped-by they are rows that were kept."""
    from megatron_post.curation.show import show as print_rows

    print_rows(
        directory, topic=topic, source=source, dropped_by=dropped_by, rows=rows, console=make_console()
    )
