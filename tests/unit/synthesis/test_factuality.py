"""Factuality: which questions give an answer, which a refusal and which no row."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_post.config.data import Source
from megatron_post.config.load import ConfigError
from megatron_post.data.rows import BadRows, read_rows
from megatron_post.storage.reading import read_object
from tests.scripted_server import ScriptedServer
from tests.unit.synthesis.code.running import check_that_it_goes_on, outcomes, run
from tests.unit.synthesis.conftest import Place
from tests.unit.synthesis.quiz import answer, fault, snippet

NONE = "no question about the snippet gives a row"
EXPECTED = {
    "knows": "answer",
    "mostly_right": "answer",
    "almost_right": NONE,
    "right_or_shy": "answer",
    "mostly_wrong": "refusal",
    "almost_wrong": NONE,
    "wrong_or_shy": "refusal",
    "shy": NONE,
    "silent": NONE,
    "cut": NONE,
    "cut_twice": "answer",
    "undecided": NONE,
    "off_scale": NONE,
    "leaky": NONE,
    "unclear": NONE,
    "unanswered": NONE,
    "points": NONE,
    "two": "answer, answer",
    "blank": "the reply has no question",
    "prose": "the reply has no question",
    "nothing": "the snippet has nothing to ask about",
    "stopped": "the reply is cut off",
    "refused_author": "refused by a model",
    "refused_policy": "refused by a model",
    "refused_judge": "refused by a model",
}
TEXTS = [snippet(manner, 10 * number) for number, manner in enumerate(EXPECTED, start=1)]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ScriptedServer(answer, fault) as server:
        yield Place(tmp_path, server)


def test_exactly_the_right_rows_come_out(place: Place) -> None:
    run(place, "factuality", TEXTS, max_failed=0.2)
    assert outcomes(place) == {n: outcome for n, outcome in enumerate(EXPECTED.values(), start=1)}
    steps = read_object(place.output / "summary.json", "summary")["summary"]["steps"]
    assert steps["write"]["results"] == {
        "the question refers to its snippet": 1,
        "repeated question": 4,
        "blank question": 1,
    }
    assert steps["screen"]["results"] == {"clear": 18, "unclear": 1, "unanswered": 1}
    assert steps["answer"]["results"] == {"cut off": 5}
    assert steps["outcome"]["results"] == {
        "answer": 6,
        "refusal": 2,
        "too few answers are informative": 4,
        "too few answers are correct, and too few are incorrect": 3,
    }
    assert steps["declines"]["results"] == {"declines": 2, "answers": 1}
    rows = {row["provenance"]["source"].rpartition("/")[2].partition(":")[0]: row for row in place.rows()}
    shares = [rows[number]["shares"] for number in ("04", "05", "11")]
    assert shares == [
        {"informative": 0.75, "correct": 1.0, "incorrect": 0.0},
        {"informative": 1.0, "correct": 0.25, "incorrect": 0.75},
        {"informative": 0.75, "correct": 1.0, "incorrect": 0.0},
    ]
    asked, given = rows["02"]["messages"]
    assert asked["content"] == "How many steps has the tower of mostly_right 20?"
    assert given["content"] == "It has 120 steps, as number 0 knows."
    assert rows["05"]["messages"][1]["content"] == "I do not know how many steps it has."
    source = Source(name="s", path=str(place.output / "rows.jsonl"))
    assert len(list(read_rows(source, bad_rows=BadRows()))) == 8


def test_the_policy_answers_without_the_snippet(place: Place) -> None:
    run(place, "factuality", TEXTS[:1])
    asked = [body for body in place.server.requests if body["messages"][0]["content"].startswith("How many")]
    assert len(asked) == 8 and {len(body["messages"]) for body in asked} == {1}
    assert not any("has 110 steps" in body["messages"][0]["content"] for body in asked)


def test_thresholds_are_settings(place: Place) -> None:
    """5 of 8 right, 5 of 8 wrong, and 5 of 8 informative are enough."""
    thresholds = {"right": 0.6, "wrong": 0.6, "informative": 0.6}
    texts = [
        text for text, manner in zip(TEXTS, EXPECTED, strict=True) if manner.startswith(("almost", "shy"))
    ]
    run(place, "factuality", texts, settings=thresholds)
    assert outcomes(place) == {1: "answer", 2: "refusal", 3: "refusal"}


def test_one_question_cannot_reach_both_thresholds(place: Place) -> None:
    with pytest.raises(ConfigError, match=r"right=0\.5 and wrong=0\.5: one question could reach both"):
        run(place, "factuality", TEXTS[:1], settings={"right": 0.5, "wrong": 0.5})


def test_a_run_that_was_cut_off_goes_on(place: Place) -> None:
    texts = [*TEXTS[:6], *TEXTS[13:18]]
    check_that_it_goes_on(place, 0.6, "factuality", texts, settings={"samples": 4})
