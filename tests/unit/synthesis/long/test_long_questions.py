"""Questions on chunks of long documents: which are kept, and where their evidence stands."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.storage.reading import read_object
from tests.scripted_server import ScriptedServer
from tests.unit.synthesis.code.running import check_that_it_goes_on, outcomes, run
from tests.unit.synthesis.conftest import Place
from tests.unit.synthesis.long.reader import answer, document, fault

NONE_PASSES = "no question on the document passes the checks"
FOUR = ", ".join(["question"] * 4)
EXPECTED = {
    "good": FOUR,
    "reflowed": FOUR,
    "many": FOUR,
    "half": "question, question",
    "points": NONE_PASSES,
    "empty": NONE_PASSES,
    "wrong": NONE_PASSES,
    "invented": NONE_PASSES,
    "repeated": NONE_PASSES,
    "echoed": NONE_PASSES,
    "off_scale": NONE_PASSES,
    "prose": NONE_PASSES,
    "nothing": NONE_PASSES,
    "cut": NONE_PASSES,
    "refused_write": "refused by a model",
    "refused_judge": "refused by a model",
    "im_end": "`data pack` would refuse the row",
    "short": "the document has too few chunks",
    "huge": "the document is longer than the largest bucket",
}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ScriptedServer(answer, fault) as server:
        yield Place(tmp_path, server)


@pytest.fixture
def settings(tokenizer_path: Path) -> dict[str, Any]:
    return {"tokenizer": str(tokenizer_path), "chunk": 200, "buckets": [500, 1000]}


def _documents(*manners: str) -> list[str]:
    towers = {"short": 1, "huge": 80, "echoed": 8}
    texts = [
        document(manner, number, towers=towers.get(manner, 14))
        for number, manner in enumerate(manners, start=1)
    ]
    texts = [text.replace("im_end", "<|im_end|>") for text in texts]
    return [text * 2 if "of echoed" in text else text for text in texts]


def test_exactly_the_right_rows_come_out(place: Place, settings: dict[str, Any]) -> None:
    texts = _documents(*EXPECTED)
    run(place, "long_questions", texts, settings=settings, max_failed=0.2)
    assert outcomes(place) == {n: outcome for n, outcome in enumerate(EXPECTED.values(), start=1)}
    steps = read_object(place.output / "summary.json", "summary")["summary"]["steps"]
    assert steps["write"]["results"] == {
        "more questions than asked for": 2,
        "no question": 2,
        "nothing to ask about": 2,
        "cut off": 2,
    }
    assert steps["evidence"]["results"] == {
        "found": 28,
        "the question points at its passage": 4,
        "question or answer is empty": 4,
        "the evidence is not in the chunk exactly once": 8,
        "the evidence is in the document several times": 4,
    }
    assert steps["judge"]["results"] == {"supported": 14, "unsupported": 6, "off scale": 4}
    tokenizer = load_tokenizer(settings["tokenizer"])
    for row in place.rows():
        content, given = (message["content"] for message in row["messages"])
        number = int(row["provenance"]["source"].rpartition("/")[2].partition(":")[0])
        assert texts[number - 1].strip() in content and row["tokens"] <= row["bucket"]
        evidence = row["evidence"]
        start, end = evidence["characters"]
        first, behind = evidence["tokens"]
        assert content[start:end] == evidence["text"] and given.removeprefix("It ")[:-1] in evidence["text"]
        ids = tokenizer.encode(content)
        assert tokenizer.decode(ids[first:behind]).strip() == evidence["text"]


def test_a_run_that_was_cut_off_goes_on(place: Place, settings: dict[str, Any]) -> None:
    texts = _documents("good", "half", "refused_judge", "prose", "many")
    check_that_it_goes_on(place, 0.5, "long_questions", texts, settings=settings, max_failed=0.5)
