"""The steps in a run: which rows are dropped, what is written beside rows, and wrong settings."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_post.config.load import ConfigError
from megatron_post.curation.run import curate
from tests.unit.curation.place import Place, dialog

EXACT = {"kind": "exact_duplicates"}
NEAR = {"kind": "near_duplicates"}
TEXT = "The old bridge over the river was built by monks who sold honey to pay for its stones and its lamps."
QUESTION = (
    "Tom buys 3 boxes with 12 eggs each and breaks 5 eggs on the way home. How many eggs are left at home?"
)


def evaluation(place: Place, *rows: dict[str, Any], **keys: Any) -> dict[str, Any]:
    path = place.directory / "evaluation.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "contamination", "evaluations": [{"name": "exam", "path": str(path), **keys}]}


def quality(column: str, name: str = "quality") -> dict[str, Any]:
    """A step that drops nothing, with a score from a key of the rows."""
    scores = {"rm": {"column": column}}
    return {
        "kind": "quality",
        "name": name,
        "reward": [{"name": "r", "models": ["rm"]}],
        "scores": scores,
        "top": 1.0,
    }


def test_exact_duplicates_name_the_row_that_is_kept(place: Place) -> None:
    place.add_source("first", [dialog("a question", TEXT), dialog("another", "answer")])
    place.add_source("second", [dialog("A  question", TEXT.upper()), dialog("a question", "else")])
    report = place.curate(EXACT, part_rows=2)
    assert report["steps"][0]["reasons"] == {"exact duplicate": 1}
    [dropped] = place.rows("dropped.jsonl")
    assert dropped["curation"]["source"] == "second"
    assert (
        dropped["curation"]["steps"]["exact_duplicates"]["duplicate_of"] == place.rows()[0]["curation"]["id"]
    )


def test_near_duplicates_name_the_row_and_the_similarity(place: Place) -> None:
    rows = [
        dialog("Tell me of the bridge.", TEXT),
        dialog("Tell me of the bridge!", f"{TEXT} Really."),
        dialog("x", "y"),
    ]
    place.add_source("chat", rows)
    place.curate(NEAR, part_rows=2)
    [dropped] = place.rows("dropped.jsonl")
    notes = dropped["curation"]["steps"]["near_duplicates"]
    assert notes["duplicate_of"] == place.rows()[0]["curation"]["id"]
    assert 0.7 <= notes["similarity"] < 1
    assert "crowded" not in notes


def test_problems_with_other_numbers_are_spared(place: Place) -> None:
    other = QUESTION.replace("12", "24").replace("5", "7")
    place.add_source(
        "chat",
        [dialog(QUESTION, "They are 31."), dialog(other, "They are 65."), dialog(QUESTION, "They are 32.")],
    )
    place.curate(NEAR)
    assert [row["messages"][1]["content"] for row in place.rows()] == ["They are 31.", "They are 65."]
    place.curate(NEAR | {"spare": ["numbers", "answers"]})
    assert len(place.rows()) == 3
    place.curate(NEAR | {"spare": [], "threshold": 0.5})
    assert len(place.rows()) == 1


@pytest.mark.parametrize("step", [EXACT, NEAR])
def test_the_best_of_several_duplicates_is_kept(place: Place, step: dict[str, Any]) -> None:
    scores = [1.0, 3.0, None, 2.0]
    place.add_source("chat", [dialog("question", TEXT) | {"score": score} for score in scores])
    place.curate(quality("score"), step | {"order_by": ["quality.score"]})
    assert [row["curation"]["place"][-1] for row in place.rows()] == ["2"]


def test_several_fields_are_multiplied(place: Place) -> None:
    """The products of the ranks are 1/3 x 1, 2/3 x 2/3 and 1 x 1/3, so the second row is the best."""
    values = [(1, 3), (2, 2), (3, 1)]
    place.add_source("chat", [dialog("question", TEXT) | {"a": a, "b": b} for a, b in values])
    steps = [quality("a", name="first"), quality("b", name="second")]
    place.curate(*steps, EXACT | {"order_by": ["first.score", "second.score"]})
    assert [row["curation"]["place"][-1] for row in place.rows()] == ["2"]


def test_negative_values_order_rows_alone_but_not_in_a_product(place: Place) -> None:
    values = [(-2.0, 1.0), (-1.0, 2.0)]
    place.add_source("chat", [dialog("question", TEXT) | {"a": a, "b": b} for a, b in values])
    steps = [quality("a", name="first"), quality("b", name="second")]
    place.curate(*steps, EXACT | {"order_by": ["first.reward"]})
    assert [row["curation"]["place"][-1] for row in place.rows()] == ["2"]
    with pytest.raises(ValueError, match=r"order_by: first\.reward has negative values, such as -2"):
        place.curate(*steps, EXACT | {"order_by": ["first.reward", "second.reward"]})


def test_rows_that_an_earlier_step_drops_do_not_count(place: Place) -> None:
    """The first of two equal rows is dropped by the first step, so the second one is kept."""
    place.add_source("chat", [dialog("a long question", "answer"), dialog("a  long  question", "answer")])
    place.curate({"kind": "lengths", "least_characters": 22}, EXACT)
    assert [row["curation"]["place"][-1] for row in place.rows()] == ["2"]
    assert place.dropped() == ["too few characters"]


def test_contaminated_rows_name_the_evaluation_row_and_the_words(place: Place) -> None:
    step = evaluation(place, {"question": "What is rain?", "answer": "Yes."}, {"question": QUESTION, "n": 3})
    place.add_source(
        "chat", [dialog("hello", "there"), dialog("Solve.", f"He said: {QUESTION}"), dialog("q", "a")]
    )
    report = place.curate(step, part_rows=1)
    [dropped] = place.rows("dropped.jsonl")
    notes = dropped["curation"]["steps"]["contamination"]
    assert notes["evaluation"] == "exam:2"
    assert notes["shared"] == "tom buys 3 boxes with 12 eggs each and breaks 5 eggs on"
    assert place.dropped() == ["shares text with exam"]
    assert report["steps"][0]["report"] == {
        "evaluations": [{"name": "exam", "rows": 2, "rows_too_short_to_compare": 1, "rows_found": 1}],
        "ngrams_of_templates": 0,
    }


def test_changed_evaluation_data_is_searched_again(place: Place) -> None:
    place.add_source("chat", [dialog(QUESTION, "answer")])
    place.curate(evaluation(place, {"question": "another question that nobody asks at any time"}))
    assert len(place.rows()) == 1
    place.curate(evaluation(place, {"question": QUESTION}))
    assert not place.rows()


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([{"question": QUESTION}], {"columns": ["query"]}, "no row has the column query"),
        ([{"n": 1}], {}, "no text of .* has 5 words or more"),
        ([{"question": "Who is it?"}], {}, "no text of .* has 5 words or more"),
        ([], {}, "no text of .* has 5 words or more"),
        (["text"], {}, r"evaluation\.jsonl:1: a row must be a mapping, not str"),
        ([{"question": QUESTION}], {"path": "/no/such.jsonl"}, r"/no/such\.jsonl does not exist"),
    ],
)
def test_wrong_evaluation_data_is_named(
    place: Place, rows: list[Any], keys: dict[str, Any], message: str
) -> None:
    place.add_source("chat", [dialog("q", "a")])
    step = evaluation(place, *rows)
    step["evaluations"][0] |= keys
    with pytest.raises(ValueError, match=message):
        place.curate(step)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (EXACT | {"order_by": ["quality"]}, "write STEP.FIELD, such as quality.score"),
        (EXACT | {"order_by": ["quality.score"]}, "reads the step 'quality', which is not before it"),
        (NEAR | {"threshold": 0}, "threshold"),
        (NEAR | {"spare": ["letters"]}, "spare"),
        (NEAR | {"spare": ["numbers", "numbers"]}, "names an item twice"),
        ({"kind": "contamination", "evaluations": []}, "evaluations"),
        ({"kind": "near"}, "near"),
    ],
)
def test_wrong_settings_are_refused_at_load(place: Place, step: dict[str, Any], message: str) -> None:
    place.add_source("chat", [dialog("q", "a")])
    place.values["steps"] = [step]
    with pytest.raises(ConfigError, match=message):
        place.settings()


def test_a_missing_field_is_refused_before_any_work(place: Place) -> None:
    place.add_source("chat", [dialog("q", "a")])
    with pytest.raises(ValueError, match=r"reads lengths\.score, and the step lengths has dropped"):
        place.curate({"kind": "lengths", "most_turns": 9}, EXACT | {"order_by": ["lengths.score"]})
    assert not place.run.exists()


def test_a_field_that_is_no_number_is_refused(place: Place) -> None:
    place.add_source("chat", [dialog("q", "a")])
    with pytest.raises(ValueError, match=r"order_by: lengths\.dropped is no number but string"):
        place.curate({"kind": "lengths", "most_turns": 9}, EXACT | {"order_by": ["lengths.dropped"]})


def test_preferences_differ_if_any_response_does(place: Place) -> None:
    def preference(rejected: str) -> dict[str, Any]:
        return {"prompt": "a question", "chosen": "good", "rejected": rejected}

    place.add_source("pairs", [preference("bad"), preference("worse"), preference("BAD")])
    place.curate(EXACT)
    assert [row["rejected"][0]["content"] for row in place.rows()] == ["bad", "worse"]


def test_calls_and_definitions_of_tools_tell_rows_apart(place: Place) -> None:
    def calling(query: str, tools: list[Any]) -> dict[str, Any]:
        call = {"function": {"name": "brave_search", "arguments": {"query": query}}}
        messages = [
            {"role": "user", "content": "search"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "found"},
            {"role": "assistant", "content": "done"},
        ]
        return {"messages": messages, "tools": tools}

    search: list[Any] = [{"type": "brave_search"}]
    more: list[Any] = [*search, {"type": "code_interpreter"}]
    rows = [calling("a", search), calling("b", search), calling("a", more), calling("a", search)]
    place.add_source("chat", rows)
    place.curate(EXACT)
    assert [row["curation"]["place"][-1] for row in place.rows()] == ["1", "2", "3"]


@pytest.mark.parametrize("size", [2, 5])
def test_any_number_of_processes_drops_the_same_rows(place: Place, size: int, tmp_path: Path) -> None:
    words = TEXT.split()
    rows = [dialog(f"question {n // 3}", " ".join([*words[n % 2 :], f"ending{n // 2}"])) for n in range(30)]
    place.add_source("chat", rows)
    place.curate(EXACT, NEAR, part_rows=4)
    expected = place.bytes()
    place.values["run"] = str(tmp_path / "shared")
    settings = place.settings()
    ranks = [
        threading.Thread(
            target=curate, args=(settings,), kwargs={"rank": rank, "size": size, "console": place.console()}
        )
        for rank in range(size)
    ]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(120)
    place.run = tmp_path / "shared"
    assert place.bytes() == expected
    assert 0 < len(place.rows()) < 30
