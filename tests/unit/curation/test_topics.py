"""The step `topics`: labels by a judge over real HTTP, answers that cannot be read, and the table."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_post.config.data import Source
from megatron_post.config.load import ConfigError
from megatron_post.curation.judge import OffScale, line_of, marks_in, rendered
from megatron_post.curation.labels import write_labels
from megatron_post.curation.run import TooManyFailures
from megatron_post.curation.taxonomy import load_taxonomy
from megatron_post.data.row_formats import example_of_row
from megatron_post.rounds.ranking import open_ranker
from tests.scripted_server import Body, ScriptedServer
from tests.unit.curation.place import Place, dialog
from tests.unit.rounds.models import tiny_policy

TAXONOMY = """
topics:
  mathematics: {about: numbers, parts: {geometry: about shapes, other: }}
  code: {parts: {debugging: , other: }}
"""
ANSWERS = {
    "circle": "Topic: mathematics / geometry",
    "sum": "I think so.\n**Topic:** Mathematics/Other.",
    "bug": "Topic: code / debugging",
    "cook": "Topic: cooking",
    "shy": "It is hard to say.",
}


def answer(body: Body) -> Any:
    """By the dialog's word. The dialog is the only part of the prompt between two tags."""
    text = body["messages"][-1]["content"].partition("<dialog>")[2].partition("</dialog>")[0]
    if "long" in text:
        return {"content": "Topic: code / other", "finish_reason": "length"}
    return next(reply for word, reply in ANSWERS.items() if word in text)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(answer, lambda body, attempt: "400" if "refuse" in str(body) else None) as server:
        yield server


@pytest.fixture
def labelled(place: Place, server: ScriptedServer) -> Place:
    (place.directory / "topics.yaml").write_text(TAXONOMY)
    place.add_judge(server.url)
    return place


def step(place: Place, **keys: Any) -> dict[str, Any]:
    return {"kind": "topics", "taxonomy": str(place.directory / "topics.yaml"), "judge": "judge", **keys}


def test_labels_and_answers_that_cannot_be_read(labelled: Place) -> None:
    words = ["circle", "sum", "bug", "cook", "shy", "long", "refuse"]
    labelled.add_source("a", [dialog(f"the {word}", "yes") for word in words])
    report = labelled.curate(step(labelled), max_failed=0.6)
    notes = labelled.notes("topics")
    assert [(note.get("coarse"), note.get("fine")) for note in notes[:3]] == [
        ("mathematics", "geometry"), ("mathematics", "other"), ("code", "debugging")]  # fmt: skip
    reasons = ("no topic of the taxonomy: cooking", "no line 'Topic'", "is cut off", "gave no answer: ")
    assert all(reason in note["failed"] for reason, note in zip(reasons, notes[3:], strict=True))
    table = {
        (topic["coarse"], topic["fine"]): topic["rows"] for topic in report["steps"][0]["report"]["topics"]
    }
    assert table == {
        ("mathematics", "geometry"): {"a": 1}, ("mathematics", "other"): {"a": 1},
        ("code", "debugging"): {"a": 1}, ("code", "other"): {"a": 0}}  # fmt: skip
    assert (report["steps"][0]["failed"], report["kept"]) == (4, 7)


def test_too_many_answers_that_cannot_be_read_end_the_run(labelled: Place) -> None:
    labelled.add_source("a", [dialog(word, "yes") for word in ("circle", "shy", "cook")])
    with pytest.raises(TooManyFailures, match=r"topics: 2 of 3 rows .*\n.* has no line 'Topic'"):
        labelled.curate(step(labelled), max_failed=0.3)


def test_nothing_is_asked_twice_and_dropped_rows_are_not_asked(
    labelled: Place, server: ScriptedServer
) -> None:
    labelled.add_source("a", [dialog("circle", "yes"), dialog("sum", "yes"), dialog("bug", "a", "b", "c")])
    turns = {"kind": "lengths", "most_turns": 1}
    labelled.curate(turns, step(labelled))
    assert len(server.requests) == 2
    labelled.curate(turns | {"most_turns": 2}, step(labelled))
    assert len(server.requests) == 3
    labelled.values["models"]["judge"]["model"] = "another"
    labelled.curate(turns, step(labelled))
    assert len(server.requests) == 5


def test_long_dialogs_lose_their_middle(labelled: Place, server: ScriptedServer) -> None:
    labelled.add_source("a", [dialog("a circle " + "x" * 900, "yes" * 300)])
    labelled.curate(step(labelled, longest=60))
    asked = (
        server.requests[0]["messages"][-1]["content"].partition("<dialog>\n")[2].partition("\n</dialog>")[0]
    )
    assert asked == "[user]\na circle " + "x" * 14 + "\n[...]\n" + "yes" * 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topics: {}", "at least 1"),
        ("topics: {a: {parts: {}}}", "at least 1"),
        ("topics: {a: {parts: {x: , X: }}}", "differ in case alone: 'x'"),
        ("topics: {a/b: {parts: {x: }}}", "a label has no slash"),
    ],
)
def test_taxonomies_that_cannot_work(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "topics.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_taxonomy(path)


def test_shipped_taxonomy() -> None:
    taxonomy = load_taxonomy(Path(__file__).resolve().parents[3] / "configs/curation/topics.yaml")
    assert len(taxonomy.topics) == 11 and len(taxonomy.pairs) == len({*taxonomy.pairs}) > 60
    assert taxonomy.find("Code/ DEBUGGING") == ("code", "debugging")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Accuracy: yes\nTone: no", {"Accuracy": True, "Tone": False}),
        ("I see.\n- **Accuracy**: No.\n\n* Accuracy: Yes\n__tone:__ 0", {"Accuracy": True, "Tone": False}),
        ("Accuracy: 1\nTone: true", {"Accuracy": True, "Tone": True}),
        ("Accuracy: yes", "no line 'Tone'"),
        ("Accuracy: yes\nTone: 5", "off the scale: Tone: 5"),
        ("Accuracy: yes\nTone: yes and no", "off the scale: Tone: yes and no"),
        ("Accuracy: yes\nTone:", "no line 'Tone'"),
        ("", "no line 'Accuracy'"),
    ],
)
def test_marks(reply: str, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(OffScale, match=expected):
            marks_in(reply, ["Accuracy", "Tone"])
    else:
        assert marks_in(reply, ["Accuracy", "Tone"]) == expected


def test_a_line_is_not_taken_from_within_another() -> None:
    with pytest.raises(OffScale):
        line_of("The Topic: x", "Topic")


MODEL_OVERRIDES = ["precision.dtype=fp32", "data.pack_length=512"]


def test_a_classifier_gives_the_labels_with_the_highest_log_probability(labelled: Place) -> None:
    """The labels are those that a direct call of the ranker finds, first among coarse and then among fine."""
    model = tiny_policy(labelled.directory / "model", text="mathematics code geometry debugging other")
    labelled.values.pop("models")
    short = [dialog(f"question {n}", "yes " * n) for n in range(1, 5)]
    labelled.add_source("a", [*short, dialog("x" * 900, "y")])
    classifier = {"model": str(model), "overrides": MODEL_OVERRIDES}
    labelled.curate(step(labelled, judge=None, classifier=classifier), max_failed=0.3, part_rows=3)
    notes = labelled.notes("topics")
    taxonomy = load_taxonomy(labelled.directory / "topics.yaml")
    with open_ranker(model, MODEL_OVERRIDES) as ranker:
        for number, note in enumerate(notes[:4], start=1):
            text = f"[user]\nquestion {number}\n\n[assistant]\n{'yes ' * number}".rstrip() + " "
            fine = list(taxonomy.topics[note["coarse"]].parts)
            for level, labels in (("coarse", list(taxonomy.topics)), ("fine", fine)):
                (logps,) = ranker.rank([(rendered("label", dialog=text, labels=labels), labels)])
                assert note[level] == labels[logps.index(max(logps))]
    assert notes[4] == {"failed": "the dialog is too long for the classifier; give the step `longest`"}


def test_rows_that_teach_a_classifier(labelled: Place) -> None:
    """`data pack` reads them, and they ask for the coarse label and then for the fine one."""
    labelled.add_source("a", [dialog("circle", "yes"), dialog("bug", "a", "b", "c"), dialog("cook", "yes")])
    labelled.curate(step(labelled), {"kind": "lengths", "most_turns": 1}, max_failed=0.5)
    output = labelled.directory / "labels.jsonl"
    assert write_labels(labelled.settings(), output) == 4
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["completion"] for row in rows] == ["mathematics", "geometry", "code", "debugging"]
    assert rows[0]["prompt"].endswith(
        "[user]\ncircle\n\n[assistant]\nyes\n</dialog>\n\nOne of: mathematics; code"
    )
    for row in rows:
        example_of_row(row, Source(name="labels", path="labels.jsonl"))
    labelled.curate({"kind": "lengths", "most_turns": 1}, models={})
    with pytest.raises(ValueError, match="there are 0 of the kind `topics`"):
        write_labels(labelled.settings(), output)


def test_either_a_judge_or_a_classifier(labelled: Place) -> None:
    labelled.add_source("a", [dialog("circle", "yes")])
    for keys in ({"judge": None}, {"classifier": {"model": "m"}}):
        with pytest.raises(ConfigError, match="give either judge or classifier"):
            labelled.curate(step(labelled, **keys))
    labelled.values.pop("models")
    with pytest.raises(ValueError, match="no directory with a model's files"):
        labelled.curate(step(labelled, judge=None, classifier={"model": str(labelled.directory / "none")}))
