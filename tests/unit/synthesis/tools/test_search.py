"""The search engine finds passages of documents, the best first, and no query is read as syntax."""

import json
from pathlib import Path

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
    return [passage["url"] for passage in index.best(query, most)]


def test_the_best_passage_is_the_first(documents: DocumentsInput) -> None:
    index = Index(documents)
    assert _places(index, "hills") == ["hills.txt:2-2", "hills.txt:1-1"]  # twice, and once, by stems
    assert _places(index, "Where does it FLOW?")[0] == "rivers.txt:2-2"
    assert _places(index, "river", most=1) == ["rivers.txt:1-1"]
    assert _places(index, "volcano") == []


@pytest.mark.parametrize(
    "query",
    ['"', "hill AND", "NEAR(hill", "text:hill OR", "hill*", "-hill", "hill\x00", "", "?", "\ud800hill"],
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
    page = json.loads(results_page("Aare", Index(documents).best("Aare", 3)))
    top = {"title": "rivers.txt", "url": "rivers.txt:1-1", "description": "The Aare is a river."}
    assert page == {"query": "Aare", "top_k": [top | {"type": "search_result"}]}


def test_a_document_that_is_no_text_is_refused(documents: DocumentsInput) -> None:
    (Path(documents.path) / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TooManyBadRows, match=r"bad\.txt"):
        Index(documents)
