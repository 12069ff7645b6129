"""The recipes for long contexts over a real Llama behind real HTTP, which writes nonsense."""

import json
from pathlib import Path

import pytest

from tests.chat_server import ChatServer
from tests.unit.rounds.models import tiny_policy
from tests.unit.synthesis.conftest import Place
from tests.unit.synthesis.long.reader import document


@pytest.mark.parametrize("recipe", ["long_questions", "long_summaries"])
def test_what_a_model_with_random_weights_writes_is_dropped(
    place: Place, tmp_path: Path, recipe: str
) -> None:
    text = document("good", 1, towers=4)
    model = tiny_policy(tmp_path / "model", text=text)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    (tmp_path / "documents").mkdir()
    for number in (1, 2):
        (tmp_path / f"documents/{number}.txt").write_text(document("good", number, towers=4))
    with ChatServer(model) as server:
        backend = {
            "kind": "server",
            "url": server.url,
            "served_model": "llama",
            "retries": 1,
            "timeout": 60.0,
        }
        author = {"model": "tiny", "backend": backend, "sampling": {"temperature": 1.0, "max_tokens": 16}}
        values = {
            "recipe": recipe,
            "settings": {"tokenizer": str(model), "chunk": 30, "buckets": [4096]},
            "input": {"kind": "documents", "path": str(tmp_path / "documents")},
            "models": {"author": author, "judge": "author"},
        }
        place.run(**values)
        requests, before = server.requests, place.bytes()
        (place.output / "summary.json").unlink()
        place.run(**values)
        assert server.requests == requests > 0 and place.bytes() == before
    assert not place.rows()
    assert {(row["failed"], row["reason"]) for row in place.rows("dropped.jsonl")} <= {
        (False, "no question on the document passes the checks"),
        (False, "a summary is cut off"),
        (False, "a summary is empty"),
        (False, "a summary is not shorter than its text"),
    }
