"""Runs a recipe over a script, and over a real Llama that gives the replies of the script."""

from pathlib import Path
from typing import Any

from tests.by_heart import llama_with_replies
from tests.chat_server import ChatServer
from tests.scripted_server import Answer, ScriptedServer
from tests.unit.synthesis.conftest import Place


def rows_of_both(
    directory: Path, answer: Answer, *, others: tuple[str, ...] = (), **values: Any
) -> tuple[list[dict[str, Any]], ...]:
    """The rows over the script, and those over the Llama, with preferences at the end.

    Both runs have as many requests, and are greedy. others: more names of the only model.
    """
    script, llama = directory / "script", directory / "llama"
    for place in (script, llama):
        place.mkdir()
    with ScriptedServer(answer) as server:
        first = Place(script, server)
        first.run(models=_models(server.url, 512, others), **values)
        bodies = list(server.requests)
        longest = llama_with_replies(directory / "model", [(body, answer(body)) for body in bodies])
        with ChatServer(directory / "model") as real:
            second = Place(llama, server)
            second.run(models=_models(real.url, longest, others), **values)
            assert real.requests == len(bodies)
    return _all_rows(first), _all_rows(second)


def _all_rows(place: Place) -> list[dict[str, Any]]:
    files = ("rows.jsonl", "preferences.jsonl")
    return [row for file in files if (place.output / file).exists() for row in place.rows(file)]


def _models(url: str, max_tokens: int, others: tuple[str, ...]) -> dict[str, Any]:
    backend = {"kind": "server", "url": url, "served_model": "m", "retries": 1, "timeout": 60.0}
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_tokens": max_tokens}
    author = {"model": "m", "backend": backend, "sampling": sampling}
    return {"author": author, **dict.fromkeys(others, "author")}
