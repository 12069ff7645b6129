"""The commands of `megatron-post curate`, with their options and their output."""

from typing import Annotated

import typer

from megatron_post.display import make_console, say
from megatron_post.plan.commands import with_default

curate_app = typer.Typer(
    cls=with_default("run"),
    no_args_is_help=True,
    help="Find the rows that are worth training on: `curate FILE`.",
)


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


@curate_app.command("labels")
def labels(
    config: Annotated[str, typer.Argument(metavar="FILE", help="YAML of a finished run with `topics`")],
    output: Annotated[str, typer.Option(help="JSON lines to write, which `data pack` reads.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Write the rows that teach a Llama to label topics as the judge did. It is then a `classifier`."""
    from megatron_post.curation.labels import write_labels
    from megatron_post.curation.settings import load_curation

    count = write_labels(load_curation(config, overrides or ()), output)
    say(f"{output}: {count:,} rows")
