"""`megatron-post merge`, `generate`, `select` and `round`: their options, and what they print."""

from typing import Annotated, Literal

import typer

rounds_app = typer.Typer()


@rounds_app.command("merge")
def merge(
    method: Annotated[
        Literal["linear", "ties", "slerp", "dare_ties"],
        typer.Argument(metavar="METHOD", help="linear, ties, slerp or dare_ties"),
    ],
    config: Annotated[str, typer.Option(help="YAML of models, weights and densities")],
    output: Annotated[str, typer.Option(help="Hugging Face directory to write")],
    workers: Annotated[int, typer.Option(help="Processes on this node.")] = 1,
) -> None:
    """Average models of one architecture, streaming. The same command again goes on with a killed one."""
    from megatron_post.rounds.merge import load_merge
    from megatron_post.rounds.merge import merge as write

    write(load_merge(config, method), output, workers=workers, report=_say)


def _say(text: str) -> None:
    print(text, flush=True)
