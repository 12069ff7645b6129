"""Tests of requests and replies in JSON."""

import json

import pytest

from megatron_post.data.dialog import Message, ToolCall
from megatron_post.inference.request import (
    Reply,
    Request,
    Sampling,
    assistant_message,
    messages_as_json,
    reply_from_json,
)


@pytest.mark.parametrize(
    ("message", "finish"),
    [
        (assistant_message("yes"), "stop"),
        (assistant_message("", reasoning="thought"), "length"),
        (assistant_message("", calls=[ToolCall("f", '{"x": 1}')], finish="tool_calls"), "tool_calls"),
        (assistant_message("text of a call", finish="tool_calls"), "tool_calls"),
    ],
)
def test_a_reply_is_read_as_it_was_written(message: Message, finish: str) -> None:
    reply = Reply(message, finish, tokens=5, prompt_tokens=7)
    found = reply_from_json(json.loads(json.dumps(reply.as_json())), "a key")
    assert found == reply and found.key == "a key" and found.text == message.content
    assert found.message.end_of_turn == (finish != "tool_calls")


def test_a_dialog_with_a_tool_in_openais_words() -> None:
    messages = [
        Message("system", "s"),
        Message("user", "u"),
        assistant_message("", calls=[ToolCall("f", {"x": 1})]),
        Message("ipython", "1"),
    ]
    call = {"id": "call_3", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert messages_as_json(messages) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "call_3"},
    ]


@pytest.mark.parametrize("messages", [(), (Message("user", "u"), Message("assistant", "a"))])
def test_who_may_ask(messages: tuple[Message, ...]) -> None:
    with pytest.raises(ValueError, match="asked by the user or a tool's output"):
        Request(messages, Sampling(), seed=0)
