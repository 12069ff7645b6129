"""Summaries of summaries, and questions that need several parts: which are kept."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_post.storage.reading import read_object
from tests.scripted_server import ScriptedServer
from tests.unit.synthesis.code.running import check_that_it_goes_on, outcomes, run
from tests.unit.synthesis.conftest import Place
from tests.unit.synthesis.long.reader import document
from tests.unit.synthesis.long.summarizer import answer, fault

BOTH = "summary, question"
EXPECTED = {
    "good": BOTH,
    "many": BOTH,  # the second question repeats the first one
    "tall": BOTH,  # its summaries are summarized twice
    "invented": "question",
    "few": "summary",
    "absent": "summary",
    "empty": "summary",
    "wrong": "summary",
    "one_part": "summary",
    "off_scale": "summary",
    "prose": "summary",
    "endless": "summary",
    "refused_questions": "summary",
    "refused_judge": "summary",
    "refused_alone": "summary",
    "refused_merge": "question",
    "fancy": "neither the summary nor a question passes the checks",
    "cut": "a summary is cut off",
    "silent": "a summary is empty",
    "long": "a summary is not shorter than its text",
    "refused_summarize": "refused by a model",
    "short": "the document has too few chunks",
}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ScriptedServer(answer, fault) as server:
        yield Place(tmp_path, server)


@pytest.fixture
def settings(tokenizer_path: Path) -> dict[str, Any]:
    return {"tokenizer": str(tokenizer_path), "chunk": 200, "buckets": [1000, 2000, 4000]}


def _documents(*manners: str) -> list[str]:
    towers = {"short": 1, "tall": 60}
    return [
        document(manner, number, towers=towers.get(manner, 14))
        for number, manner in enumerate(manners, start=1)
    ]


def test_exactly_the_right_rows_come_out(place: Place, settings: dict[str, Any]) -> None:
    texts = _documents(*EXPECTED)
    run(place, "long_summaries", texts, settings=settings, max_failed=0.1)
    assert outcomes(place) == {n: outcome for n, outcome in enumerate(EXPECTED.values(), start=1)}
    steps = read_object(place.output / "summary.json", "summary")["summary"]["steps"]
    assert steps["merge"]["results"] == {"a number that the document does not have": 2}
    assert steps["questions"]["results"] == {
        "more questions than asked for": 1,
        "too few parts are needed": 1,
        "a part that does not exist": 1,
        "question or answer is empty": 1,
        "no question": 2,
        "cut off": 1,
    }
    assert steps["judge"]["results"]["unsupported"] == 1
    assert steps["alone"]["results"]["enough"] == 1 and steps["alone"]["results"]["off scale"] > 1
    for row in place.rows():
        content, given = (message["content"] for message in row["messages"])
        number = int(row["provenance"]["source"].rpartition("/")[2].partition(":")[0])
        assert texts[number - 1].strip() in content and row["tokens"] <= row["bucket"]
        if row["kind"] == "question":
            assert row["needed"] == [1, 2, 3] and given == "By their steps."
        else:
            towers = re.findall(r"tower of \w+ (\d+) has (\d+)", texts[number - 1])
            assert f"towers 0 to {towers[-1][0]}, {towers[0][1]} to {towers[-1][1]} steps" in given


def test_summaries_are_summarized_until_one_is_left(place: Place, settings: dict[str, Any]) -> None:
    run(place, "long_summaries", _documents("tall"), settings=settings)
    prompts = [body["messages"][0]["content"] for body in place.server.requests]
    merged = [prompt.count("Part ") for prompt in prompts if prompt.startswith("These are summaries")]
    parts = place.rows()[0]["parts"]
    assert len(merged) > 2 and sum(merged[:-1]) <= parts  # one summary may be left for the last time
    assert sum(prompt.startswith("Summarize this part") for prompt in prompts) == parts


def test_a_run_that_was_cut_off_goes_on(place: Place, settings: dict[str, Any]) -> None:
    texts = _documents("good", "one_part", "refused_questions", "long", "many")
    check_that_it_goes_on(place, 0.5, "long_summaries", texts, settings=settings, max_failed=0.5)
