"""Runs a recipe for code on files, and says what became of each of them."""

import shutil
from typing import Any

import pytest

from megatron_post.synthesis.recipe import load_recipe
from tests.unit.synthesis.conftest import Place

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def run(place: Place, recipe: str, texts: list[str], *, size: int = 1, **values: Any) -> None:
    """Write the texts as the files 01, 02 and so on, and run a recipe on them. One model does all parts.

    size: processes, one after the other.
    """
    code = place.directory / "code"
    code.mkdir(exist_ok=True)
    for number, text in enumerate(texts, start=1):
        (code / f"{number:02d}").write_text(text)
    backend = {"kind": "server", "url": place.server.url, "served_model": "author", "timeout": 20.0}
    author = {"model": "author", "backend": backend, "sampling": {"max_tokens": 4096}}
    models = {name: author if name == "author" else "author" for name in load_recipe(recipe).models}
    documents = {"kind": "documents", "path": str(code)}
    values = {"max_failed": 0.02, **values, "recipe": recipe, "input": documents, "models": models}
    for rank in reversed(range(size)):
        place.run(rank=rank, size=size, **values)


def outcomes(place: Place) -> dict[int, str]:
    """What became of each file: the kinds of its rows, or why it was dropped."""
    found: dict[int, str] = {}
    for row in place.rows():
        number = _number(row["provenance"]["source"])
        found[number] = f"{found[number]}, {row['kind']}" if number in found else row["kind"]
    dropped = {_number(row["source"]): row["reason"] for row in place.rows("dropped.jsonl")}
    assert not set(found) & set(dropped)
    return found | dropped


def _number(source: str) -> int:
    return int(source.rpartition("/")[2].partition(":")[0])


def check_that_it_goes_on(place: Place, share: float, recipe: str, texts: list[str], **values: Any) -> None:
    """A kill leaves a part of the journal, whose last line is torn. Two processes ask the rest, and the bytes
    are the same."""
    run(place, recipe, texts, **values)
    expected, asked = place.bytes(), place.asked()
    (journal,) = (place.output / "journal").glob("journal-*.jsonl")
    content = journal.read_bytes()
    content = content[: int(share * len(content))]
    shutil.rmtree(place.output)
    journal.parent.mkdir(parents=True)
    journal.write_bytes(content)
    run(place, recipe, texts, size=2, **values)
    assert place.bytes() == expected
    kept = content.count(b'"kind":"reply"')
    assert place.asked() in (asked - kept, asked - kept + 1)  # the torn line may be a reply
