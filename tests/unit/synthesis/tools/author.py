"""An author who calls tools as a script says, and a judge."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.scripted_server import Answer, Body

_CASE = re.compile(r"case (\d+)")


@dataclass(frozen=True)
class Script:
    """What the author does with a case.

    calls: pairs of a tool and its argument, in order. at_once: the first reply has all of them. says: the
    text before each call.
    """

    calls: Sequence[tuple[str, Any]] = ()
    at_once: bool = False
    says: str = "I look."
    answer: str = "Done."
    request: str | None = None  # the whole reply to the prompt that asks for one
    verdict: str = "supported"
    finish: Mapping[int, str] = field(default_factory=dict)  # of the n-th reply with tools


def author(scripts: Mapping[int, Script]) -> Answer:
    """The text of an input row has the number of its case, and so has the request."""

    def answer(body: Body) -> str | dict[str, Any]:
        first = body["messages"][0]["content"]
        number = _CASE.search(first)
        assert number is not None, first
        script = scripts[int(number[1])]
        if "Verdict:" in first:
            return f"I compare.\nVerdict: {script.verdict}"
        if "tools" not in body:
            return script.request or f"<request>Do case {number[1]}.</request>"
        turn = sum(message["role"] == "tool" for message in body["messages"])
        finish = {"finish_reason": script.finish[turn]} if turn in script.finish else {}
        if script.at_once:
            messages = [call(*each) for each in script.calls]
            return {"content": "", "tool_calls": [each["tool_calls"][0] for each in messages]}
        if turn < len(script.calls):
            return call(*script.calls[turn], says=script.says) | finish
        return {"content": script.answer, **finish}

    return answer


def call(tool: str, argument: Any, *, says: str = "") -> dict[str, Any]:
    """OpenAI's message with one call. argument: the only argument if it is a text, or all arguments."""
    if isinstance(argument, str):
        argument = {"code" if tool == "code_interpreter" else "query": argument}
    function = {"name": tool, "arguments": json.dumps(argument)}
    return {"content": says, "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
