"""The step `difficulty`: tags of intentions, ratings, and how they become one score."""

from collections.abc import Iterator
from typing import Any

import pytest

from megatron_post.config.load import ConfigError
from megatron_post.curation.difficulty import normalized_tag
from tests.scripted_server import Body, ScriptedServer
from tests.unit.curation.place import Place, dialog

# word in the dialog -> tags and rating
ANSWERS = {
    "easy": ("Tags: greeting", "Difficulty: 1"),
    "hard": ("Tags: Solve equations; solve equation, Prove-Theorem ; persona", "**Difficulty:** 3"),
    "four": ("Tags: greetings", "Difficulty: 4"),
    "none": ("Tags: ;", "Difficulty: 2"),
    "loop": ("Tags: " + "; ".join(f"tag {n}" for n in range(60)), "Difficulty: two"),
}


def answer(body: Body) -> str:
    text = body["messages"][-1]["content"]
    word = next(word for word in ANSWERS if word in text.partition("<dialog>")[2].partition("</dialog>")[0])
    return ANSWERS[word]["You judge how difficult" in text]


@pytest.fixture
def judged(place: Place) -> Iterator[Place]:
    with ScriptedServer(answer) as server:
        place.add_judge(server.url)
        place.add_source("a", [dialog(word, "yes") for word in ANSWERS])
        yield place


def step(**keys: Any) -> dict[str, Any]:
    return {"kind": "difficulty", "tags": "judge", "rating": "judge", **keys}


def test_both_measures_are_kept_and_combined(judged: Place) -> None:
    """Of 4 tags that count as 1, the easy row has a quarter. The hard row has three."""
    report = judged.curate(step(most_tags=4), max_failed=0.5)
    notes = judged.notes("difficulty")
    assert [note.get("tags") for note in notes] == [
        ["greeting"], ["solve equation", "prove theorem", "persona"], ["greeting"], None, None]  # fmt: skip
    assert [note.get("rating") for note in notes] == [1, 3, None, 2, None]
    assert [note.get("score") for note in notes[2:]] == [None] * 3
    assert [note["score"] for note in notes[:2]] == pytest.approx([(1 / 4 + 1 / 3) / 2, (3 / 4 + 1) / 2])
    shown = report["steps"][0]["report"]
    assert shown["rows_by_number_of_tags"] == {"1": 2, "3": 1} and shown["tags"]["greeting"] == 2
    assert shown["rows_by_rating"] == {"1": 1, "2": 1, "3": 1}


def test_other_combinations_ask_nothing_again_and_drop_easy_rows(judged: Place) -> None:
    judged.curate(step(most_tags=4), max_failed=0.5)
    before = judged.times()
    judged.curate(step(most_tags=4, combine="product", at_least=0.5))
    new = {path.split("/")[1].rpartition("-")[0] for path in judged.times().keys() - before.keys()}
    assert new == {"difficulty"}
    assert judged.dropped() == ["too easy"]
    assert judged.rows()[0]["curation"]["steps"]["difficulty"]["score"] == pytest.approx(3 / 4)


def test_rare_tags_are_left_out(judged: Place) -> None:
    judged.curate({"kind": "difficulty", "tags": "judge", "least_rows": 2}, max_failed=0.5)
    assert [note.get("tags") for note in judged.notes("difficulty")][:3] == [["greeting"], [], ["greeting"]]
    assert judged.notes("difficulty")[1]["score"] == 0


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        (" Solve_Equations. ", "solve equation"),
        ("#coding", "coding"),
        ("write stories", "write story"),
        ("fix class", "fix class"),
        ("data analysis", "data analysis"),
        ("C++ bus", "c bus"),
        ("GPS", "gps"),
        ("--", ""),
    ],
)
def test_normalized_tags(tag: str, expected: str) -> None:
    assert normalized_tag(tag) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tags": None, "rating": None}, "it has neither tags nor rating"),
        ({"tags": None, "most_tags": 3}, "no effect without tags"),
        ({"rating": None, "combine": "min"}, "combine has no effect without both"),
        ({"rating": "jugde"}, r"asks 'jugde', which is not in models \(did you mean 'judge'"),
    ],
)
def test_settings_that_cannot_work(judged: Place, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judged.curate(step(**keys))
