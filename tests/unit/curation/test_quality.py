"""The step `quality`: rewards or marks, ties, empty topics, unknown rewards, marks off the scale."""

import json
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_post.config.load import ConfigError
from megatron_post.curation.quality import top_part
from tests.scripted_server import Body, ScriptedServer
from tests.unit.curation.place import Place, dialog

REWARD = {"name": "helpful", "models": ["rm"]}
BY_KEY = {"reward": [REWARD], "scores": {"rm": {"column": "score"}}}


def quality(**keys: Any) -> dict[str, Any]:
    return {"kind": "quality", **keys}


def rows(*scores: Any) -> list[dict[str, Any]]:
    return [dialog(f"question {n}", f"answer {n}") | {"score": score} for n, score in enumerate(scores)]


def kept(place: Place) -> list[str]:
    return [row["messages"][0]["content"].removeprefix("question ") for row in place.rows()]


def test_a_quarter_is_kept_with_all_that_tie(place: Place) -> None:
    """Of 8 rows 2 are in the top part. The second and third best are equal, so 3 rows are kept."""
    place.add_source("a", rows(1, 7, 5, 3, 7, 9, 0, 2))
    place.curate(quality(**BY_KEY), part_rows=3)
    assert kept(place) == ["1", "4", "5"]
    assert {*place.dropped()} == {"low reward"}
    scores = [note["score"] for note in place.notes("quality")]
    assert scores == [7 / 8, 7 / 8, 1, 2 / 8, 5 / 8, 4 / 8, 1 / 8, 3 / 8]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((3,), ["0"]),  # one row alone is the top part
        ((3, 3, 3, 3, 3), ["0", "1", "2", "3", "4"]),
        ((1, None, "9", True, math.nan, math.inf, 2), ["6"]),  # of two rewards one is the top part
        ((None, math.nan), []),
        ((-5, -6, -7, -8, -9), ["0", "1"]),  # ceil(5 / 4) = 2
    ],
)
def test_few_equal_and_unknown_rewards(place: Place, scores: tuple[Any, ...], expected: list[str]) -> None:
    place.add_source("a", rows(*scores))
    place.curate(quality(**BY_KEY))
    assert kept(place) == expected
    unknown = {"neither a reward nor marks"} if len(scores) in (2, 7) else set()
    assert {*place.dropped()} - {"low reward"} == unknown


@given(
    st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(math.nan)), max_size=40),
    st.fractions(Fraction(1, 100), 1, max_denominator=100),
)
def test_the_top_part_is_that_of_its_definition(values: list[float], share: Fraction) -> None:
    """A row is in it if fewer than ceil(share x n) rows of its group are better. Groups alternate."""
    groups = [str(row % 2) for row in range(len(values))]
    top, ranks = top_part(np.array(values, np.float64), groups, float(share))
    for row, value in enumerate(values):
        own = [other for other in values[row % 2 :: 2] if not math.isnan(other)]
        expected = not math.isnan(value) and sum(other > value for other in own) < math.ceil(share * len(own))
        assert top[row] == expected
        if not math.isnan(value):
            assert ranks[row] == sum(other <= value for other in own) / len(own)


def test_scores_of_files_belong_to_the_rows_of_their_source(place: Place) -> None:
    """`score` numbers rows by their line. The second row of the source a is bad, and has no score."""
    good = rows(None, None, None)
    place.add_source("a", [good[0], {"messages": []}, *good[1:]])
    place.add_source("b", rows(None))
    path = place.directory / "scores.jsonl"
    path.write_text("".join(json.dumps({"row": row, "scores": [score, -9]}) + "\n"
                            for row, score in ((1, 0.5), (3, 2.5), (4, math.nan))))  # fmt: skip
    step = quality(reward=[REWARD], scores={"rm": {"files": {"a": str(path)}}}, top=0.5)
    place.curate(step, max_bad_rows=1)
    rewards = [(note.get("reward"), note.get("top")) for note in place.notes("quality")]
    assert rewards == [(2.5, True), (0.5, False), (None, None), (None, None)]
    before = place.times()
    path.write_text('{"row": 1, "scores": [5]}\n')
    place.curate(step)
    new = {name.split("/")[1].rpartition("-")[0] for name in place.times().keys() - before.keys()}
    assert new == {"quality.scores", "quality"}
    path.write_text('{"row": 3, "scores": [5]}\n' * 2)
    with pytest.raises(ValueError, match=f"{path}: a row has two scores"):
        place.curate(step)
    path.write_text('{"row": 1, "scores": []}\n')
    with pytest.raises(ValueError, match=f"{path}:1: no score of one response"):
        place.curate(step)


def test_several_rewards_have_weights_and_thresholds_by_capability(place: Place) -> None:
    """Safety counts three times for chat and not at all for code.

    The rewards are 2 + 3 = 5, 0 + 6 = 6, 9 - 3 = 6, 5 and 4. The top 0.4 of 5 rows are those with 6. One of
    them is not safe. A safety of -9 does not matter for code, but its reward is too low.
    """
    found = [("chat", 2, 1), ("chat", 0, 2), ("chat", 9, -1), ("code", 5, -9), ("code", 4, 9)]
    place.add_source("a", [dialog(f"question {n}", "a") | {"capability": name, "helps": helps, "s": safety}
                           for n, (name, helps, safety) in enumerate(found)])  # fmt: skip
    rewards: list[dict[str, Any]] = [
        {"name": "helpfulness", "models": ["help"]},
        {"name": "safety", "models": ["safe"], "weight": {"chat": 3.0}, "at_least": {"chat": 0.0}},
    ]
    scores = {"help": {"column": "helps"}, "safe": {"column": "s"}}
    place.curate(quality(reward=rewards, scores=scores, top=0.4))
    assert [note["reward"] for note in place.notes("quality")] == [6, 5, 6, 5, 4]
    assert kept(place) == ["1"]
    assert place.dropped() == ["low reward", "safety below its threshold", "low reward", "low reward"]
    rewards[1]["weight"] = {"chats": 3.0}
    with pytest.raises(ValueError, match="no prompt of the rows has the capability 'chats'"):
        place.curate(quality(reward=rewards, scores=scores, top=0.4))


WORDS = {
    "good": "It is fine.\nAccuracy: yes\nInstructions: yes\nTone: yes",
    "rude": "Accuracy: yes\nInstructions: yes\nTone: no",
    "five": "Accuracy: 5\nInstructions: 5\nTone: 5",
}


def judge(body: Body) -> str:
    text = body["messages"][-1]["content"]
    if "Free of bugs" in text:
        return f"Free of bugs: {'no' if 'bug!' in text else 'yes'}\nIntent: yes"
    if "You sort dialogs" in text:
        return "Topic: code / other" if "program" in text else "Topic: talk / other"
    return next(reply for word, reply in WORDS.items() if word in text.partition("<dialog>")[2])


@pytest.fixture
def judged(place: Place) -> Iterator[Place]:
    (place.directory / "topics.yaml").write_text(
        "topics: {talk: {parts: {other: }}, code: {parts: {other: }}, x: {parts: {y: }}}"
    )
    with ScriptedServer(judge) as server:
        place.add_judge(server.url)
        yield place


def test_the_union_and_the_matrix_of_disagreement(judged: Place) -> None:
    """Of 6 rewards 2 are the top part. Marks save a row of low reward and one without a reward."""
    words = ["good", "rude", "good", "five", "rude", "five", "good"]
    scores = [9, 8, 1, 1, 2, 3, None]
    judged.add_source("a", [dialog(f"question {n}", word) | {"score": score}
                            for n, (word, score) in enumerate(zip(words, scores, strict=True))])  # fmt: skip
    report = judged.curate(quality(**BY_KEY, marks={"judge": "judge"}), max_failed=0.5)
    assert kept(judged) == ["0", "1", "2", "6"]
    assert judged.dropped() == ["low reward", "low reward and marks", "low reward"]
    matrix = report["steps"][0]["report"]["top_and_full_marks"]["a"]
    assert matrix == {
        "yes": {"yes": 1, "no": 1, "unknown": 0},
        "no": {"yes": 1, "no": 1, "unknown": 2},
        "unknown": {"yes": 1, "no": 0, "unknown": 0},
    }
    marked = judged.rows()[1]["curation"]["steps"]["quality"]
    assert (marked["marks"], marked["full"]) == (["Accuracy", "Instructions"], False)
    assert marked["score"] == pytest.approx((5 / 6 + 2 / 3) / 2, abs=1e-12)


def test_code_has_marks_of_its_own(judged: Place) -> None:
    judged.add_source("chat", [dialog("a program", "bug!"), dialog("a program", "fine"), dialog("q", "good")])
    judged.add_source("github", [dialog("x", "bug!"), dialog("x", "y")])
    topics = {"kind": "topics", "taxonomy": str(judged.directory / "topics.yaml"), "judge": "judge"}
    marks = {"judge": "judge", "code_topics": ["code"], "code_sources": ["github"]}
    judged.curate(topics, quality(topics="topics", marks=marks))
    assert [row["messages"][1]["content"] for row in judged.rows()] == ["fine", "good", "y"]
    assert judged.dropped() == ["low marks", "low marks"]


def test_a_quarter_of_each_topic(judged: Place) -> None:
    """4 rows are about code, one is about talk, and none is about x. Each topic keeps its best row."""
    scored = [("program", 1), ("program", 2), ("program", 3), ("program", 4), ("talk", 0)]
    judged.add_source("a", [dialog(word, "a") | {"score": score} for word, score in scored])
    topics = {"kind": "topics", "taxonomy": str(judged.directory / "topics.yaml"), "judge": "judge"}
    judged.curate(topics, quality(**BY_KEY, topics="topics", per_topic=True))
    assert [row["score"] for row in judged.rows()] == [4, 0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "it has neither reward nor marks"),
        ({"reward": [REWARD]}, "scores has no 'rm', which reward names"),
        ({**BY_KEY, "scores": {"rm": {"column": "s"}, "x": {"column": "s"}}}, "no reward names 'x'"),
        ({"reward": [REWARD], "scores": {"rm": {}}}, "give either column or files"),
        ({"reward": [REWARD], "scores": {"rm": {"files": {"b": "x"}}}}, "names the source 'b', which is not"),
        ({**BY_KEY, "per_topic": True}, "per_topic and code_topics need topics"),
        ({"marks": {"judge": "judge"}, "top": 0.5}, "top and per_topic have no effect without reward"),
        ({**BY_KEY, "topics": "lengths"}, "this step is of the kind lengths, and not `topics`"),
        ({**BY_KEY, "topics": "topic"}, r"reads the step 'topic', which is not before it"),
    ],
)
def test_settings_that_cannot_work(judged: Place, keys: dict[str, Any], message: str) -> None:
    judged.add_source("a", rows(1))
    if "marks" not in keys:
        judged.values.pop("models")
    with pytest.raises(ConfigError, match=message):
        judged.curate({"kind": "lengths", "most_turns": 1}, quality(**keys))


def test_a_topic_of_a_weight_must_be_known(judged: Place) -> None:
    judged.add_source("a", rows(1))
    topics = {"kind": "topics", "taxonomy": str(judged.directory / "topics.yaml"), "judge": "judge"}
    reward = [REWARD | {"weight": {"cod": 1.0}}]
    with pytest.raises(ConfigError, match=r"'cod' is no coarse topic of .*did you mean 'code'"):
        judged.curate(topics, quality(**BY_KEY | {"reward": reward}, topics="topics"))
