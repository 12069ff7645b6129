"""Rows of recipes are rows of `data pack`: their final turn is trained, and nothing before it."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_post.config.data import Source
from megatron_post.data.dialog import BadRow, Dialog, Message, Preference, ToolCall
from megatron_post.data.row_formats import example_of_row
from megatron_post.data.row_keys import KeyCounts
from megatron_post.data.rows import BadRows, read_rows
from megatron_post.data.step_example import Solution, StepExample
from megatron_post.synthesis.row import PreferenceRow, Row, StepLabels, readable_messages, row_id

CORRECTED = [
    Message("system", "be brief"),
    Message("user", "q"),
    Message("assistant", "wrong"),
    Message("user", "it fails"),
    Message("assistant", "right"),
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}]
CALLED = [
    Message("user", "q"),
    Message("assistant", "", (ToolCall("add", {"a": 1}),), end_of_turn=False),
    Message("ipython", "2"),
    Message("assistant", "two"),
]


def _read(tmp_path: Path, *rows: dict[str, Any], train_on: Any = "all_turns") -> list[Dialog]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = KeyCounts()
    source = Source(name="s", path=str(path))
    found = list(read_rows(source, bad_rows=BadRows(), train_on=train_on, counts=counts))
    assert set(counts.unused) <= {
        *("id", "capability", "kind", "provenance", "answer"),
        *("messages.tool_calls.id", "messages.tool_call_id"),
    }
    assert all(isinstance(example, Dialog) for _, example in found)
    return [example for _, example in found]  # type: ignore[misc]


@pytest.mark.parametrize("train_on", ["all_turns", "last_turn"])
def test_the_final_turn_is_trained_alone(tmp_path: Path, train_on: str) -> None:
    rows = [Row(CORRECTED, "code", kind="correction"), Row(CALLED, "tools", tools=TOOLS)]
    corrected, called = _read(tmp_path, *(row.as_json({}) for row in rows), train_on=train_on)
    trained = [
        message.content for message in corrected.messages if message.trained and message.role == "assistant"
    ]
    assert trained == ["right"]
    assert [message.content for message in corrected.messages] == [m.content for m in CORRECTED]
    assert called.tools == tuple(TOOLS) and called.messages[1].tool_calls == CALLED[1].tool_calls
    assert all(message.trained for message in called.messages)


def test_a_message_that_is_masked_in_the_final_turn_stays_so(tmp_path: Path) -> None:
    first = Message("assistant", "", (ToolCall("add", {}),), end_of_turn=False, trained=False)
    (found,) = _read(tmp_path, Row([CALLED[0], first, *CALLED[2:]], "tools", tools=TOOLS).as_json({}))
    assert [message.trained for message in found.messages if message.role == "assistant"] == [False, True]


def test_the_id_is_of_the_content(tmp_path: Path) -> None:
    row = Row(CORRECTED, "code", extra={"answer": "4"}).as_json({"source": "a:1", "parents": ["x"]})
    again = Row(CORRECTED, "code", parents=("y",), extra={"answer": "4"}).as_json({"source": "b:2"})
    assert row["id"] == again["id"] == row_id(row) and len(row["id"]) == 32
    assert again["provenance"] == {"source": "b:2", "parents": ["y"]} and row["answer"] == "4"
    others = [Row(CORRECTED[1:], "code"), Row(CORRECTED, "math"), Row(CORRECTED, "code", kind="k")]
    assert len({row["id"], *(other.as_json({})["id"] for other in others)}) == 4
    _read(tmp_path, row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Row([Message("user", "q")], "c"), "no assistant message"),
        (Row([Message("user", "q"), Message("assistant", " ")], "c"), "empty response"),
        (Row([Message("user", "q"), Message("assistant", "<|im_end|>")], "c"), "chat template"),
        (Row(CORRECTED, "c", extra={"messages": []}), "extra has messages"),
        (Row(CORRECTED, "c", extra={"label": False}), "response is bad"),
        (Row(CORRECTED, "c", extra={"x": float("nan")}), "not JSON"),
        (Row(CORRECTED, "c", extra={"x": ["\ud800"]}), "not JSON"),
    ],
)
def test_what_pack_would_refuse_is_refused(row: Row, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        row.as_json({})


def test_labelled_steps_are_rows_of_their_own() -> None:
    steps = StepLabels("q", ["a", "b"], [True, False], "math", extra={"soft_labels": [0.5, 0.0]})
    row = steps.as_json({"source": "a:1"})
    assert {key: row[key] for key in ("prompt", "completions", "labels", "soft_labels")} == {
        **{"prompt": "q", "completions": ["a", "b"], "labels": [True, False], "soft_labels": [0.5, 0.0]}
    }
    assert [message["role"] for message in readable_messages(row)] == ["user", "step, right", "step, wrong"]
    example = example_of_row(row, Source(name="s", path="rows.jsonl"))
    assert isinstance(example, StepExample)
    assert example.solutions == (Solution(("a", "b"), (True, False)),)
    for wrong, reason in (
        (StepLabels("q", ["a"], [True, False], "math"), "1 steps have 2 labels"),
        (StepLabels("q", [], [], "math"), "0 steps have 0 labels"),
        (StepLabels("q", ["<|im_end|>"], [True], "math"), "chat template"),
        (StepLabels("q", ["a"], [True], "math", extra={"labels": []}), "extra has labels"),
        (StepLabels("q", ["a"], [1], "math"), "true or false"),  # type: ignore[list-item]
    ):
        with pytest.raises(BadRow, match=reason):
            wrong.as_json({})


def test_a_preference_is_a_row_of_its_own() -> None:
    chosen, rejected = Message("assistant", "short"), Message("assistant", "far too long")
    made = PreferenceRow(CORRECTED[:4], chosen, rejected, "steerability", kind="length", extra={"turn": 2})
    row = made.as_json({"source": "a:1"})
    read = example_of_row(row, Source(name="s", path="rows.jsonl"))
    assert isinstance(read, Preference) and [m.content for m in read.prompt] == [
        message.content for message in CORRECTED[:4]
    ]
    assert [response[0].content for response in read.responses] == ["short", "far too long"]
    assert [message["role"] for message in readable_messages(row)] == [
        *("system", "user", "assistant", "user", "chosen", "rejected")
    ]
    for wrong, reason in (
        (PreferenceRow(CORRECTED[:4], chosen, chosen, "c"), "nothing to prefer"),
        (PreferenceRow(CORRECTED, chosen, rejected, "c"), "must end with a user"),
        (PreferenceRow(CORRECTED[:4], Message("assistant", ""), rejected, "c"), "empty response"),
        (PreferenceRow(CORRECTED[:4], chosen, Message("assistant", "<|im_end|>"), "c"), "chat template"),
        (PreferenceRow(CORRECTED[:4], chosen, rejected, "c", extra={"chosen": 1}), "extra has chosen"),
    ):
        with pytest.raises(BadRow, match=reason):
            wrong.as_json({})


def test_values_that_are_not_json_have_no_id() -> None:
    with pytest.raises(BadRow, match="not JSON"):
        row_id({"when": object()})
