"""An author and a judge for the recipes of mathematics, whose replies follow a script in the problem."""

import json
import re
from typing import Any

from tests.scripted_server import Body

# "What is 3 + 4? [solve=right,wrong judge=true]": the reply with seed k is the k-th of the step, or the last
_PROBLEM = re.compile(r"What is (\d+) \+ (\d+)\? \[(.*?)\]")
_SUM = re.compile(r"(\d+) \+ (\d+) = (\d+)")
_STEPS = {  # by how a prompt begins
    "Solve this problem step by step": "solve",
    "You check each step": "judge",
    "Someone has begun": "continue",
    "Write up to": "write",
    "You check mathematical problems": "screen",
    "Solve this problem. Reason": "calls",
}
BOMB = "9^{9^{9^{9}}}"


def problem(first: int, second: int, **script: str) -> str:
    steps = " ".join(f"{step}={manners}" for step, manners in script.items())
    return f"What is {first} + {second}? [{steps}]"


def answer(body: Body) -> str | dict[str, Any]:
    messages = body["messages"]
    first, last, step = messages[0]["content"], messages[-1]["content"], _step(body)
    if step == "write":
        return _document(first)
    found = _PROBLEM.search(first)
    assert found is not None, first
    manner = _manner(found[3], step, body)
    a, b = int(found[1]), int(found[2])
    if step == "judge":
        return _judged(first.partition("Solution:")[2], manner)
    if step == "screen":
        return f"It says what is wanted.\nVerdict: {manner}"
    if step == "calls":
        return _calls(a, b, manner, turn=len(messages) // 2, last=last)
    return solution(a, b, manner)


def fault(body: Body, attempt: int) -> str | None:
    """Refuses what is "refused" by the script."""
    step, found = _step(body), _PROBLEM.search(body["messages"][0]["content"])
    return "400" if found and step != "write" and _manner(found[3], step, body) == "refused" else None


def _step(body: Body) -> str:
    first = body["messages"][0]["content"]
    step = next(step for begin, step in _STEPS.items() if first.startswith(begin))
    return "correct" if step == "solve" and len(body["messages"]) > 1 else step


def _manner(script: str, step: str, body: Body) -> str:
    manners = dict(part.split("=") for part in script.split()).get(step, "right").split(",")
    return manners[min(body["seed"], len(manners) - 1)]


def solution(a: int, b: int, manner: str) -> str | dict[str, Any]:
    """A reply to "What is a + b?"."""
    total = a + b
    added = total + 1 if manner in ("wrong", "lucky") else total
    final = {
        "wrong": str(total + 1),
        "fraction": f"\\frac{{{2 * total}}}{{2}}",
        "decimal": f"{total}.0",
        "bomb": BOMB,
        "long": "1" * 2000,
    }.get(manner, str(total))
    text = f"## Step 1: add\n{a} + {b} = {added}\n\n## Step 2: answer\nThe sum is known."
    match manner:
        case "prose":
            return "I am sorry, but I cannot help with that."
        case "no_box":
            return f"{text}\nThe final answer is: {total}"
        case "no_steps":
            return f"{a} + {b} = {total}\nThe final answer is: $\\boxed{{{total}}}$"
        case "cut":
            return {"content": f"{text} \\boxed{{{total}}} and", "finish_reason": "length"}
        case "other":
            text = text.replace("add", "put together")
    return f"{text}\nThe final answer is: $\\boxed{{{final}}}$"


def _judged(steps: str, manner: str) -> str:
    """The verdict of a judge who can add, unless the script has another."""
    parts = re.split(r"\[Step \d+\]", steps.partition("Work through")[0])[1:]
    verdicts = [
        "right" if all(int(a) + int(b) == int(c) for a, b, c in _SUM.findall(part)) else "wrong"
        for part in parts
    ]
    match manner:
        case "off_scale":
            verdicts[0] = "mostly right"
        case "short":
            verdicts = verdicts[:-1]
        case "blind":
            verdicts = ["right"] * len(parts)
        case "endless":
            return {"content": "I calculate again. " * 50, "finish_reason": "length"}  # type: ignore[return-value]
    lines = "\n".join(f"Step {number}: {verdict}" for number, verdict in enumerate(verdicts, start=1))
    return f"Step 1: I add.\n\n{lines}\n"


def _calls(a: int, b: int, manner: str, *, turn: int, last: str) -> str | dict[str, Any]:
    """A dialog with the interpreter. turn: how many outputs there have been."""
    box = f"The final answer is: $\\boxed{{{a + b}}}$"
    programs = {
        "right": [f"total = {a} + {b}", "print(total)"],
        "lies": ["print('7')", "print('8')"],
        "error": [f"x = {a} +", f"print({a} + {b})"],
        "exit": ["import os; os._exit(0)"],
        "loop": ["while True: pass", f"{a} + {b}"],
        "many": [f"print({number})" for number in range(10)],
        "other_tool": ["print(1)"],
    }.get(manner, [])
    if turn < len(programs):
        name = "brave_search" if manner == "other_tool" else "code_interpreter"
        argument = {"query": "sum"} if manner == "other_tool" else {"code": programs[turn]}
        function = {"name": name, "arguments": json.dumps(argument)}
        call = {"id": "call_1", "type": "function", "function": function}
        return {"content": f"Program {turn + 1}.", "tool_calls": [call]}
    if manner == "right":
        total = re.search(r"\[stdout\]\n(\d+)", last)
        assert total is not None, last
        return f"It printed {total[1]}. The final answer is: $\\boxed{{{total[1]}}}$"
    return f"It is {a + b + 1}. \\boxed{{{a + b + 1}}}" if manner == "lies" else f"So it is. {box}"


def _document(prompt: str) -> str:
    """The reply that the text of a document has after "REPLY:"."""
    return prompt.partition("REPLY:")[2].strip()
