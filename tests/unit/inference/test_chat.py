"""Tests of request bodies and replies in OpenAI's chat protocol."""

import json
from typing import Any

import pytest

from megatron_post.data.dialog import Message, ToolCall
from megatron_post.inference.chat import NoCompletion, Unusable, parse_completion, request_body
from megatron_post.inference.request import Request, Sampling, assistant_message
from tests.unit.inference.asking import answer

CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"x": "\ud800"}'}}


def _completion(message: dict[str, Any], finish: str = "stop", **usage: Any) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}], "usage": usage}).encode()


@pytest.mark.parametrize(
    ("reason", "finish"),
    [(None, "stop"), (128009, "stop"), (128008, "tool_calls"), ("<|eom_id|>", "tool_calls")],
)
def test_where_vllm_stopped(reason: int | str | None, finish: str) -> None:
    """vLLM's finish reason is "stop" for every stop token, and `stop_reason` is the token."""
    choice = {"message": {"content": "call"}, "finish_reason": "stop", "stop_reason": reason}
    content = json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}})
    assert parse_completion(content.encode()) == answer("call", 3, finish)


@pytest.mark.parametrize("content", [None, "", "Let me see."])
def test_calls_of_tools_are_a_reply(content: str | None) -> None:
    found = parse_completion(_completion({"content": content, "tool_calls": [CALL]}, "tool_calls"))
    call = ToolCall("f", '{"x": "?"}')  # a lone surrogate is not valid text
    assert found == answer(content or "", 0, "tool_calls", calls=[call])
    assert found.message.tool_calls[0].parameters == {"x": "?"} and not found.message.end_of_turn


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_is_kept_apart(key: str) -> None:
    """vLLM has two names for it, and a null means none. Reasoning that used all of max_tokens is no reply."""
    found = parse_completion(
        _completion({"content": "4", key: "2 + 2", "tool_calls": None}, completion_tokens=7, prompt_tokens=3)
    )
    assert found == answer("4", 7, prompt_tokens=3, reasoning="2 + 2") and found.text == "4"
    assert parse_completion(_completion({"content": "4", key: None})) == answer("4", 0)
    with pytest.raises(Unusable, match="without text"):
        parse_completion(_completion({"content": None, key: "2 + 2"}, "length"))


@pytest.mark.parametrize(
    "calls",
    [
        [CALL, CALL],  # Llama 3's format allows one call per message
        [CALL | {"function": {"name": "f", "arguments": "{broken"}}],
        [CALL | {"function": {"name": "f", "arguments": "[1]"}}],
        [CALL | {"function": {"name": "brave_search", "arguments": '{"q": 1}'}}],
    ],
)
def test_calls_that_cannot_be_kept(calls: list[dict[str, Any]]) -> None:
    with pytest.raises(Unusable, match="cannot be kept: "):
        parse_completion(_completion({"content": None, "tool_calls": calls}, "tool_calls"))


@pytest.mark.parametrize(
    "message",
    [
        {"content": 7},
        {"content": ["x"]},
        {"content": "x", "reasoning": 7},
        {"content": "x", "tool_calls": 7},
        {"content": "x", "tool_calls": ["f"]},
        {"content": "x", "tool_calls": [{"function": {"name": "f"}}]},
        {"content": "x", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"tool_calls": [CALL]},
    ],
)
def test_other_types_are_no_completion(message: dict[str, Any]) -> None:
    with pytest.raises(NoCompletion):
        parse_completion(_completion(message))


@pytest.mark.parametrize("count", [-1, 1.0, "5", True, 2**40])
def test_counts_of_tokens_are_whole_numbers(count: Any) -> None:
    for name in ("completion_tokens", "prompt_tokens"):
        with pytest.raises(NoCompletion):
            parse_completion(_completion({"content": "x"}, **{name: count}))


def test_what_a_server_is_sent() -> None:
    """It has tools, calls, outputs, and earlier reasoning, which the server's template may render."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {}}}}
    messages = (
        Message("user", "?"),
        assistant_message("", calls=[ToolCall("f", {"x": 1})], reasoning="so"),
        Message("ipython", "2"),
    )
    body = request_body(Request(messages, Sampling(temperature=0.5), 2**31 + 5, (tool,)), "m")
    call = {"id": "call_2", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert body["messages"] == [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "call_2"},
    ]
    assert body["tools"] == [tool] and body["parallel_tool_calls"] is False
    assert (body["model"], body["temperature"], body["seed"]) == ("m", 0.5, 5)
    assert "tools" not in request_body(Request(messages, Sampling(), 0), "m")
