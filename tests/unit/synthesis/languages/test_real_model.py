"""Translation over a real Llama behind real HTTP, which writes nonsense."""

import json
from pathlib import Path

import pytest

from tests.chat_server import ChatServer
from tests.unit.rounds.models import tiny_policy
from tests.unit.synthesis.conftest import Place
from tests.unit.synthesis.languages.translator import row, texts

pytest.importorskip("py3langid")


def test_what_a_model_with_random_weights_writes_is_dropped(place: Place, tmp_path: Path) -> None:
    text = "\n".join(texts("en", "Anna", 12, 5))
    model = tiny_policy(tmp_path / "model", text=text, positions=4096)
    rows = [row("Anna", number, 5) for number in (12, 13)]
    (tmp_path / "input.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
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
            "recipe": "translated_reasoning",
            "settings": {"columns": {"user": "question", "assistant": "answer"}},
            "input": {"kind": "rows", "path": str(tmp_path / "input.jsonl")},
            "models": {"author": author, "judge": "author"},
        }
        place.run(**values)
        requests, before = server.requests, place.bytes()
        (place.output / "summary.json").unlink()
        place.run(**values)
        assert server.requests == requests == 2 and place.bytes() == before
    assert not place.rows()
    assert {(each["failed"], each["reason"]) for each in place.rows("dropped.jsonl")} <= {
        (False, "the translation is cut off"),
        (False, "the translation is not in the form that was asked for"),
    }
