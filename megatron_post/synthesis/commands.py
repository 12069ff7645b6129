"""`megatron-post synthesize`: its commands and their options, and what they print."""

import os
from typing import Annotated

import typer

from megatron_post.display import make_console, say

synthesize_app = typer.Typer(no_args_is_help=True, help="Have models write data, by recipes.")


@synthesize_app.command("list")
def list_recipes() -> None:
    """Print the recipes, and what each makes."""
    from megatron_post.synthesis.recipe import built_in_recipes, load_recipe

    for recipe in map(load_recipe, built_in_recipes()):
        say(f"{recipe.name} (version {recipe.version}): {recipe.summary}")
        does = ["runs programs"] * recipe.runs_programs + ["compares answers"] * recipe.compares_answers
        say("; ".join([f"  asks {', '.join(recipe.models)}", *does]))
        for name, field in recipe.settings.model_fields.items():
            say(f"  settings.{name}: {field.description}")


@synthesize_app.command("run")
def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML: recipe, input, models, output")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    rank: Annotated[
        int | None, typer.Option(help="Number of this process, from 0; by default that of a Slurm array.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Processes that share the input; by default those of a Slurm array.")
    ] = None,
) -> None:
    """Run a recipe on every row of the input. The same command again goes on with an interrupted run."""
    from megatron_post.synthesis.run import share_of, synthesize
    from megatron_post.synthesis.settings import load_synthesis

    settings = load_synthesis(config, overrides or ())
    rank, size = share_of(rank, size, os.environ)
    synthesize(settings, rank=rank, size=size, console=make_console())


@synthesize_app.command("show")
def show(
    file: Annotated[str, typer.Argument(metavar="ROWS", help="rows.jsonl or dropped.jsonl of a run")],
    row: Annotated[int, typer.Option(min=1, help="Number of the row, from 1.")] = 1,
) -> None:
    """Print all that led to a row: each request, reply and program."""
    from megatron_post.synthesis.show import show_row

    show_row(file, row, console=make_console())


@synthesize_app.command("report")
def report(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="directory of a run, finished or not")],
) -> None:
    """Write report.html: what was kept and dropped, and why."""
    from pathlib import Path

    from megatron_post.synthesis.report import write_report_of

    say(write_report_of(Path(output)))
