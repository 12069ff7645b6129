"""The commands of `megatron-post synthesize`, with their options and their output."""

import os
from typing import Annotated

import typer

from megatron_post.display import make_console, say

synthesize_app = typer.Typer(no_args_is_help=True, help="Have models write data, by recipes.")
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML: recipe, input, models, output")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]


@synthesize_app.command("list")
def list_recipes() -> None:
    """Print each recipe with what it makes and its settings."""
    from megatron_post.synthesis.recipe import built_in_recipes, load_recipe

    for recipe in map(load_recipe, built_in_recipes()):
        say(f"{recipe.name} (version {recipe.version}): {recipe.summary}")
        does = ["runs programs"] * recipe.runs_programs + ["compares answers"] * recipe.compares_answers
        say("; ".join([f"  asks {', '.join(recipe.models) or 'no model'}", *does]))
        for name, field in recipe.settings.model_fields.items():
            say(f"  settings.{name}: {field.description}")


@synthesize_app.command("run")
def run(
    config: Config,
    overrides: Overrides = None,
    rank: Annotated[
        int | None, typer.Option(help="Number of this process, from 0; by default that of a Slurm array.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Processes that share the input; by default those of a Slurm array.")
    ] = None,
) -> None:
    """Run a recipe on every row of the input. The same command resumes an interrupted run."""
    from megatron_post.parallel.environment import share_of
    from megatron_post.synthesis.run import synthesize
    from megatron_post.synthesis.settings import load_synthesis

    settings = load_synthesis(config, overrides or ())
    rank, size = share_of(rank, size, os.environ)
    synthesize(settings, rank=rank, size=size, console=make_console())


@synthesize_app.command("serve", hidden=True)
def serve(config: Config, overrides: Overrides = None) -> None:
    """Run one server of the run's `serve` section. Jobs of `launch synthesize` call this."""
    from megatron_post.synthesis.serving import serve as run_server
    from megatron_post.synthesis.settings import load_synthesis

    raise typer.Exit(run_server(load_synthesis(config, overrides or ()), console=make_console()))


@synthesize_app.command("end-servers", hidden=True)
def end_servers(config: Config, overrides: Overrides = None) -> None:
    """End the servers of a run. `launch synthesize` queues this as a job that depends on the clients."""
    from megatron_post.synthesis.serving import end_servers as end
    from megatron_post.synthesis.settings import load_synthesis

    end(load_synthesis(config, overrides or ()).servers)


@synthesize_app.command("show")
def show(
    file: Annotated[str, typer.Argument(metavar="ROWS", help="rows.jsonl or dropped.jsonl of a run")],
    row: Annotated[int, typer.Option(min=1, help="Number of the row, from 1.")] = 1,
) -> None:
    """Print each request, reply and program that led to a row."""
    from megatron_post.synthesis.show import show_row

    show_row(file, row, console=make_console())


@synthesize_app.command("report")
def report(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="directory of a run, finished or not")],
) -> None:
    """Write report.html, which shows the rows that were kept and dropped, and why."""
    from pathlib import Path

    from megatron_post.synthesis.report import write_report_of

    say(write_report_of(Path(output)))
