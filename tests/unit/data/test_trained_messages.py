"""The row's form, `train_on` and marks of messages decide which messages of a row are trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_post.config.data import Source
from megatron_post.data.dialog import Dialog
from megatron_post.data.rows import BadRows, TooManyBadRows, read_rows
from megatron_post.data.template import TokenRole, render
from megatron_post.data.tokenizer import Tokenizer, train_small_tokenizer

USER, ANSWER = {"role": "user"}, {"role": "assistant"}
SUMS = [
    USER | {"content": "1+1?"},
    ANSWER | {"content": "3"},
    USER | {"content": "No."},
    ANSWER | {"content": "2"},
]
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_small_tokenizer(["system user assistant ipython\n\n1+1? No. 3 2"] * 9, 300)


def trained_texts(directory: Path, row: dict[str, Any], tokenizer: Tokenizer, **fields: Any) -> list[str]:
    """The texts of the trained runs of tokens of a row, with terminators."""
    (directory / "rows.jsonl").write_text(json.dumps(row))
    train_on = fields.pop("data_train_on", "all_turns")
    source = Source(name="s", path=str(directory / "rows.jsonl"), **fields)
    ((_, dialog),) = read_rows(source, bad_rows=BadRows(), train_on=train_on)
    assert isinstance(dialog, Dialog)
    rendered = render(dialog, tokenizer)
    trained = np.isin(rendered.roles, (TokenRole.BODY, TokenRole.TERMINATOR))
    edges = np.flatnonzero(np.diff(trained.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(rendered.tokens[start:end].tolist()) for start, end in edges]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"train": False}, {"train": True}),
        ({"loss": False}, {"loss": True}),
        ({"training": False}, {}),
        ({"trainable": False}, {}),
        ({"weight": 0}, {"weight": 1}),
        ({"weight": 0.0}, {"weight": 1.0}),
        ({"mask": True}, {}),
        ({"loss_mask": 0}, {"mask": False, "weight": None}),
        ({"step_loss_mask": 0, "weight": 0}, {"train": True, "loss_mask": 1}),
    ],
)
@pytest.mark.parametrize("train_on", ["all_turns", "last_turn"])
def test_a_masked_message_is_context(
    tmp_path: Path, tokenizer: Tokenizer, first: dict[str, Any], second: dict[str, Any], train_on: str
) -> None:
    messages = [SUMS[0], SUMS[1] | first, SUMS[2], SUMS[3] | second]
    assert trained_texts(tmp_path, {"messages": messages}, tokenizer, train_on=train_on) == ["2<|eot_id|>"]


def test_a_mark_comes_before_train_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [SUMS[0], SUMS[1] | {"train": True}, *SUMS[2:]]
    found = trained_texts(tmp_path, {"messages": messages}, tokenizer, train_on="last_turn")
    assert found == ["3<|eot_id|>", "2<|eot_id|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": SUMS[:3], "completion": SUMS[3:]},
        {"prompt": SUMS[:3], "completion": "2"},
        {"prompt": [SUMS[0], SUMS[1] | {"train": False}, SUMS[2]], "completion": SUMS[3:]},
    ],
)
def test_a_completion_is_trained_alone(tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    assert trained_texts(tmp_path, row, tokenizer) == ["2<|eot_id|>"]


def test_messages_train_all_turns_or_the_last(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The last turn is everything after the last user message, here a call, its result and the answer."""
    turn = [ANSWER | {"tool_calls": [CALL]}, {"role": "tool", "content": "2"}, SUMS[3]]
    row = {"messages": [*SUMS[:3], *turn]}
    every = trained_texts(tmp_path, row, tokenizer)
    assert [text[:1] + text[-10:] for text in every] == ["3<|eot_id|>", "<<|eom_id|>", "2<|eot_id|>"]
    assert trained_texts(tmp_path, row, tokenizer, train_on="last_turn") == every[1:]
    assert trained_texts(tmp_path, row, tokenizer, data_train_on="last_turn") == every[1:]
    both = {"train_on": "all_turns", "data_train_on": "last_turn"}
    assert trained_texts(tmp_path, row, tokenizer, **both) == every


def test_masks_change_no_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokens = []
    for mark in ({}, {"train": False}):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [SUMS[0], SUMS[1] | mark, *SUMS[2:]]}))
        source = Source(name="s", path=str(tmp_path / "rows.jsonl"))
        ((_, dialog),) = read_rows(source, bad_rows=BadRows())
        assert isinstance(dialog, Dialog)
        tokens.append(render(dialog, tokenizer).tokens.tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [SUMS[0], SUMS[1] | {"weight": 0.5}]}, "message 2 has weight=0.5; it must be true"),
        (
            {"messages": [SUMS[0], SUMS[1] | {"train": "false"}]},
            "message 2 has train='false'; it must be true",
        ),
        (
            {"messages": [SUMS[0], SUMS[1] | {"train": True, "weight": 0}]},
            "that it is not: train=True, weight=0",
        ),
        ({"messages": [SUMS[0], SUMS[1] | {"mask": True, "loss": 1}]}, "that it is not: mask=True, loss=1"),
        ({"messages": [SUMS[0] | {"train": True}, SUMS[1]]}, "message 1 from user is marked as trained"),
        ({"messages": [SUMS[0], SUMS[1] | {"loss": False}]}, "nothing is trained"),
        ({"prompt": [SUMS[0], SUMS[1] | {"loss": 1}, SUMS[2]], "completion": "2"}, "a message of the prompt"),
        ({"prompt": "1", "completion": [SUMS[1] | {"loss": 0}]}, "nothing is trained"),
    ],
)
def test_marks_that_cannot_be_obeyed_are_bad_rows(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(TooManyBadRows, match=reason):
        list(read_rows(Source(name="s", path=str(tmp_path / "rows.jsonl")), bad_rows=BadRows()))
