"""The command line of `megatron-post annotate`."""

from typing import Annotated

import typer

from megatron_post.config.section import MOST
from megatron_post.display import say

annotate_app = typer.Typer(no_args_is_help=True, help="Let people compare responses.")

Pages = Annotated[str, typer.Argument(metavar="DIRECTORY", help="pairs and pages, for those who compare")]
Key = Annotated[str, typer.Option(help="JSON lines of which model wrote which response, to keep apart")]


@annotate_app.command("export")
def export(
    directory: Pages,
    samples: Annotated[list[str], typer.Argument(metavar="SAMPLES...", help="files that `generate` wrote")],
    key: Key,
    pairs: Annotated[int | None, typer.Option(min=1, max=MOST, help="Largest number of pairs.")] = None,
    pages: Annotated[int, typer.Option(min=1, max=MOST, help="Pages for the pairs.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the pairs and their order.")] = 0,
) -> None:
    """Draw a pair of responses to each prompt, from two checkpoints where there are two."""
    from pathlib import Path

    from megatron_post.rounds.annotation.export import export_pairs
    from megatron_post.rounds.annotation.settings import Annotation

    settings = Annotation(pairs=pairs, pages=pages)
    say(export_pairs([Path(path) for path in samples], Path(directory), Path(key), settings, seed=seed))


@annotate_app.command("import")
def import_(
    directory: Pages,
    answers: Annotated[str, typer.Argument(metavar="ANSWERS", help="file of a page, or a directory of them")],
    key: Key,
    output: Annotated[str, typer.Option(help="JSON lines of preferences to write")],
    enough: Annotated[int | None, typer.Option(min=1, help="Answers that suffice. By default all.")] = None,
    max_bad_rows: Annotated[int, typer.Option(min=0, help="Bad rows of answers that are left out.")] = 0,
) -> None:
    """Check what people have answered row by row, and write their preferences."""
    from pathlib import Path

    from megatron_post.rounds.annotation.answers import import_answers

    found = import_answers(
        Path(directory), Path(key), Path(answers), Path(output), enough=enough, max_bad_rows=max_bad_rows
    )
    say(f"{output}: {found}")
