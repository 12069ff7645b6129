"""An author who calls tools as a script says, and a judge."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.scripted_server import Answer, Body

_CASE = re.compile(r"case (\d+)")
_NEED = re.compile(r"must need (\w+),.*?(\d+) towns", re.DOTALL)
_REQUEST = re.compile(r"Use (\w+) on the (\d+) towns(, twice)?")


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


def towns(body: Body) -> str | dict[str, Any]:
    """Requests and calls that follow from the number of the text."""
    first = body["messages"][0]["content"]
    if "Verdict:" in first:
        return "Verdict: supported"
    if "tools" not in body:
        found = _NEED.search(first)
        assert found is not None, first
        twice = ", twice" if "at least two calls" in first else ""
        return f"<request>Use {found[1]} on the {found[2]} towns{twice}.</request>"
    asked = _REQUEST.search(first)
    assert asked is not None, first
    number, turn = int(asked[2]), sum(message["role"] == "tool" for message in body["messages"])
    if turn >= (2 if asked[3] else 1):
        return "That is it."
    arguments = {
        "code_interpreter": [
            f"import random\nx = {{str(n) for n in range({number})}}\nprint(list(x)[:3], random.random())",
            "print(len(x), random.random())",
        ],
        "wolfram_alpha": [f"integrate(x^{number}, (x, 0, 2))", f"factorint({number} + 100)"],
        "brave_search": [f"town {number}", f"mayor of {number}"],
    }[asked[1]]
    return call(asked[1], arguments[turn], says="Now this.")
