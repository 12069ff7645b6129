"""Runs a recipe over a script, and over a real Llama that gives the replies of the script."""

from pathlib import Path
from typing import Any

from tests.by_heart import llama_with_replies
from tests.chat_server import ChatServer
from tests.scripted_server import Answer, ScriptedServer
from tests.unit.synthesis.conftest import Place


def rows_of_both(directory: Path, answer: Answer, **values: Any) -> tuple[list[dict[str, Any]], ...]:
    """The rows over the script, and those over the Llama. Both have as many requests, and are greedy."""
    script, llama = directory / "script", directory / "llama"
    for place in (script, llama):
        place.mkdir()
    with ScriptedServer(answer) as server:
        first = Place(script, server)
        first.run(models={"author": _author(server.url, 512)}, **values)
        bodies = list(server.requests)
        longest = llama_with_replies(directory / "model", [(body, answer(body)) for body in bodies])
        with ChatServer(directory / "model") as real:
            second = Place(llama, server)
            second.run(models={"author": _author(real.url, longest)}, **values)
            assert real.requests == len(bodies)
    return first.rows(), second.rows()


def _author(url: str, max_tokens: int) -> dict[str, Any]:
    backend = {"kind": "server", "url": url, "served_model": "m", "retries": 1, "timeout": 60.0}
    return {
        "model": "m",
        "backend": backend,
        "sampling": {"temperature": 0.0, "top_p": 1.0, "max_tokens": max_tokens},
    }
