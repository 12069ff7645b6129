"""A row of 128K tokens of real documentation fits a pack of 128K, and its evidence is where the span says."""

import contextlib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest

from megatron_post.data.dialog import BadRow
from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.synthesis.long.tokens import trainable
from tests.documentation import ROOT
from tests.scripted_server import Body, ScriptedServer
from tests.unit.synthesis.code.running import run
from tests.unit.synthesis.conftest import Place
from tests.unit.synthesis.long.packed import LONGEST, pack


def _quote(body: Body) -> str:
    """A question on the longest line of a chunk."""
    prompt = body["messages"][0]["content"]
    if prompt.startswith("You check"):
        return "Verdict: supported"
    line = max(prompt.partition("The text:")[2].splitlines(), key=len).strip()
    question = f"What follows {line[:30]!r}?"
    return f"<question>{question}</question><answer>{line[30:60]}</answer><evidence>{line}</evidence>"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ScriptedServer(_quote) as server:
        yield Place(tmp_path, server)


def _document(path: Path) -> str:
    """This project's pages and those of the installed packages, up to 130,000 tokens."""
    names = {found.metadata["Name"]: str(found.metadata.get_payload() or "") for found in distributions()}
    pages = [page.read_text() for page in sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(filter(_is_taken, [*pages, *(names[name] for name in sorted(names))]))
    places = load_tokenizer(path).places(text)
    assert len(places) >= 130_000
    return text[: places[130_000][0]].strip()


def _is_taken(page: str) -> bool:
    """Whether `data pack` takes it. Pages on chat templates have marks of templates."""
    with contextlib.suppress(BadRow):
        return bool(trainable(page.strip()))
    return False


def test_a_row_of_128k_is_packed_with_its_evidence(place: Place, any_tokenizer: Path) -> None:
    settings = {"tokenizer": str(any_tokenizer), "chunks": 3, "questions": 1}
    document = _document(any_tokenizer)
    run(place, "long_questions", [document], settings=settings)
    rows = place.rows()
    assert len(rows) == 3 and {row["bucket"] for row in rows} == {LONGEST}
    assert all(129_900 < row["tokens"] <= LONGEST for row in rows)
    tokenizer = load_tokenizer(any_tokenizer)
    dialogs = {row["tokens"]: row for row in rows}
    packed = pack(place.directory, place.output / "rows.jsonl", any_tokenizer)
    assert sorted(map(len, packed)) == sorted(row["tokens"] for row in rows)
    opening = [tokenizer.bos_id, tokenizer.special("<|start_header_id|>"), *tokenizer.encode("user")]
    before = len(opening) + 1 + len(tokenizer.encode("\n\n"))
    for tokens in packed:
        first, behind = dialogs[len(tokens)]["evidence"]["tokens"]
        evidence = tokenizer.decode(tokens[before + first : before + behind].tolist())
        text = dialogs[len(tokens)]["evidence"]["text"]
        assert text in evidence and len(evidence) < len(text) + 20 and text in document
