"""The search engine finds passages of documents, the best first, and no query is read as syntax."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from megatron_post.data.rows import TooManyBadRows
from megatron_post.synthesis.inputs import DocumentsInput
from megatron_post.synthesis.tools.search import Index, results_page


@pytest.fixture
def documents(tmp_path: Path) -> DocumentsInput:
    (tmp_path / "rivers.txt").write_text("The Aare is a river.\nIt flows from glaciers to Koblenz.\n")
    (tmp_path / "hills.txt").write_text("The Napf is a hill.\nThe hill has hill farms and rivers.\n")
    return DocumentsInput(kind="documents", path=str(tmp_path), size=1)


def _places(index: Index, query: str, most: int = 10) -> list[str]:
    return [passage["url"] for passage in index.best(query, most, longest=1000)]


def test_the_best_passage_is_the_first(documents: DocumentsInput) -> None:
    index = Index(documents)
    assert _places(index, "hills") == ["hills.txt:2-2", "hills.txt:1-1"]  # twice, and once, by stems
    assert _places(index, "Where does it FLOW?")[0] == "rivers.txt:2-2"
    assert _places(index, "river", most=1) == ["rivers.txt:1-1"]
    assert _places(index, "volcano") == []


@pytest.mark.parametrize(
    "query",
    [
        '"',
        "hill AND",
        "NEAR(hill",
        "text:hill OR",
        "hill*",
        "-hill",
        "hill\x00",
        "",
        "?",
        "_",
        "__ hill",
        "\ud800hill",
    ],
)
def test_a_query_has_no_syntax(documents: DocumentsInput, query: str) -> None:
    assert set(_places(Index(documents), query)) <= {
        *("hills.txt:1-1", "hills.txt:2-2", "rivers.txt:1-1", "rivers.txt:2-2")
    }


def test_a_long_query_is_cut(documents: DocumentsInput) -> None:
    assert _places(Index(documents), " ".join(f"word{number}" for number in range(100_000)) + " hill") == []


def test_an_index_is_known_by_its_passages(documents: DocumentsInput) -> None:
    before = Index(documents).checksum
    assert Index(documents).checksum == before
    (Path(documents.path) / "hills.txt").write_text("The Napf is no hill.\n")
    assert Index(documents).checksum != before


def test_a_page_of_results(documents: DocumentsInput) -> None:
    page = json.loads(results_page("Aare", Index(documents).best("Aare", 3, longest=1000)))
    top = {"title": "rivers.txt", "url": "rivers.txt:1-1", "description": "The Aare is a river."}
    assert page == {"query": "Aare", "top_k": [top | {"type": "search_result"}]}


def test_a_long_passage_gives_the_part_with_the_words_of_the_query(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("sand " * 1000 + "with gold in it" + " sand" * 1000)
    (tmp_path / "word.txt").write_text("silver " + "x" * 5000)
    index = Index(DocumentsInput(kind="documents", path=str(tmp_path)))
    (part,) = (passage["description"] for passage in index.best("gold", 3, longest=400))
    assert "with gold in it" in part and len(part) <= 400
    (part,) = (passage["description"] for passage in index.best("silver", 3, longest=400))
    assert part.startswith("silver x") and len(part) == 400
    (whole,) = (passage["description"] for passage in index.best("silver", 3, longest=5007))
    assert whole == "silver " + "x" * 5000


def test_a_document_that_is_no_text_is_refused_unless_it_is_allowed(documents: DocumentsInput) -> None:
    (Path(documents.path) / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TooManyBadRows, match=r"bad\.txt.*\n.*settings\.bad_documents"):
        Index(documents)
    assert _places(Index(documents, bad=1), "volcano glaciers") == ["rivers.txt:2-2"]


def test_a_full_disk_is_named(documents: DocumentsInput, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(sqlite3.Connection):
        def __init__(self, *values: Any, **options: Any) -> None:
            super().__init__(*values, **options)
            self.execute("PRAGMA max_page_count = 10")

    monkeypatch.setattr(sqlite3, "connect", Small)
    (Path(documents.path) / "long.txt").write_text("\n".join(f"word{number}" for number in range(20_000)))
    with pytest.raises(ValueError, match=r"settings\.documents: .* is full\. TMPDIR"):
        Index(documents)


def test_documents_without_a_passage_are_refused(documents: DocumentsInput, tmp_path: Path) -> None:
    missing = documents.model_copy(update={"path": str(tmp_path / "none")})
    with pytest.raises(ValueError, match=r"settings\.documents\.path: .*none does not exist"):
        Index(missing)
    with pytest.raises(ValueError, match=r"settings\.documents\.pattern=\*\.md: .* has no such file"):
        Index(documents.model_copy(update={"pattern": "*.md"}))
    with pytest.raises(ValueError, match=r"settings\.documents: .* has no passage that is taken"):
        Index(documents.model_copy(update={"least": 5}))
