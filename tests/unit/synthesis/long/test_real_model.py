"""The recipes for long contexts over a real Llama behind real HTTP, which writes nonsense."""

from pathlib import Path
from typing import Any

import pytest

from megatron_post.storage.reading import read_object
from tests.chat_server import ChatServer
from tests.unit.rounds.models import tiny_policy
from tests.unit.synthesis.by_heart import rows_of_both
from tests.unit.synthesis.code.running import needs_bubblewrap
from tests.unit.synthesis.conftest import Place
from tests.unit.synthesis.long.reader import document
from tests.unit.synthesis.long.repositories import answer, write_repository


def _reasons(
    place: Place, recipe: str, text: str, *, settings: dict[str, Any], judges: dict[str, str], **values: Any
) -> set[tuple[bool, str]]:
    """Run a recipe twice, and return why its rows were dropped. The second run sends no request.

    text: what the tokenizer of the Llama is made of. judges: the models beside the author.
    """
    model = tiny_policy(place.directory / "model", text=text, positions=4096)
    settings = {"tokenizer": str(model), "buckets": [4096], **settings}
    with ChatServer(model) as server:
        backend = {"kind": "server", "url": server.url, "served_model": "llama", "retries": 1}
        sampling = {"temperature": 1.0, "max_tokens": 16}
        author = {"model": "tiny", "backend": {**backend, "timeout": 60.0}, "sampling": sampling}
        models = {"author": author, **judges}
        place.run(recipe=recipe, settings=settings, models=models, **values)
        requests, before = server.requests, place.bytes()
        (place.output / "summary.json").unlink()
        place.run(recipe=recipe, settings=settings, models=models, **values)
        assert server.requests == requests > 0 and place.bytes() == before
    assert not place.rows()
    return {(row["failed"], row["reason"]) for row in place.rows("dropped.jsonl")}


@pytest.mark.parametrize("recipe", ["long_questions", "long_summaries"])
def test_what_a_model_with_random_weights_writes_is_dropped(place: Place, recipe: str) -> None:
    documents = place.directory / "documents"
    documents.mkdir()
    for number in (1, 2):
        (documents / f"{number}.txt").write_text(document("good", number, towers=4))
    found = _reasons(
        place,
        recipe,
        document("good", 1, towers=4),
        settings={"chunk": 30},
        input={"kind": "documents", "path": str(documents)},
        judges={"judge": "author"},
    )
    assert found <= {
        (False, "no question on the document passes the checks"),
        (False, "a summary is cut off"),
        (False, "a summary is empty"),
        (False, "a summary is not shorter than its text"),
    }


@needs_bubblewrap
def test_a_model_with_random_weights_writes_no_file_of_a_repository(place: Place) -> None:
    """Its request has the whole repository, and what it writes is no list of files."""
    write_repository(place.directory / "repositories", "good")
    text = (place.directory / "repositories/good/src/shapes/core.py").read_text()
    found = _reasons(
        place,
        "long_code",
        text,
        settings={"tries": 2},
        judges={},
        input={"kind": "repositories", "path": str(place.directory / "repositories")},
        sandbox={"kind": "bubblewrap", "limits": {"seconds": 60.0}},
    )
    assert found == {(False, "no answer on the repository passes the checks")}
    steps = read_object(place.output / "summary.json", "summary")["summary"]["steps"]
    assert steps["ask"]["requests"] == 2
    assert steps["list"]["results"].keys() <= {"the list is cut off", "the list is missing"}


@needs_bubblewrap
def test_long_code_over_a_llama_that_gives_the_replies_of_a_script(tmp_path: Path) -> None:
    """The files and the code of a reply pass through a real template, and the code is checked by parsing."""
    write_repository(tmp_path / "repositories", "good")
    expected, found = rows_of_both(
        tmp_path,
        answer,
        recipe="long_code",
        settings={"tokenizer": str(tiny_policy(tmp_path / "tokenizer")), "buckets": [4096], "tries": 1},
        input={"kind": "repositories", "path": str(tmp_path / "repositories")},
        sandbox={"kind": "bubblewrap", "limits": {"seconds": 60.0}},
    )
    for key in ("messages", "kind", "importers", "tokens", "bucket"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    assert [row["kind"] for row in found] == ["importers", "code"]
