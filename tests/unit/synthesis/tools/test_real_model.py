"""The recipes for tools over a real Llama behind real HTTP, which writes nonsense."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import ChatServer
from tests.unit.rounds.models import tiny_policy
from tests.unit.synthesis.conftest import Place

SETTINGS: dict[str, dict[str, Any]] = {
    "tool_use": {"tools": ["code_interpreter"]},
    "tool_files": {},
}


@pytest.mark.parametrize("recipe", SETTINGS)
def test_what_a_model_with_random_weights_writes_is_dropped(
    place: Place, tmp_path: Path, recipe: str
) -> None:
    text = "The mill was built in 1790, and it grinds three tons of wheat in a day.\n"
    model = tiny_policy(tmp_path / "model", text=text * 20)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    (tmp_path / "corpus").mkdir()
    for number in (1, 2):
        (tmp_path / f"corpus/{number}.txt").write_text(text * number)
    with ChatServer(model) as server:
        backend = {
            "kind": "server",
            "url": server.url,
            "served_model": "llama",
            "retries": 1,
            "timeout": 60.0,
        }
        author = {"model": "tiny", "backend": backend, "sampling": {"temperature": 1.0, "max_tokens": 16}}
        kind = "files" if recipe == "tool_files" else "documents"
        values = {
            "recipe": recipe,
            "settings": SETTINGS[recipe],
            "input": {"kind": kind, "path": str(tmp_path / "corpus")},
            "models": {"author": author, "judge": "author"},
        }
        place.run(**values)
        requests, before = server.requests, place.bytes()
        (place.output / "summary.json").unlink()
        place.run(**values)
        assert server.requests == requests == 2 and place.bytes() == before
    assert {(row["failed"], row["reason"]) for row in place.rows("dropped.jsonl")} <= {
        (False, "the request is cut off"),
        (False, "the reply has no request, or several"),
    }
