"""Documents on towers, and an author and a judge who read them in the manner that the towers' names say."""

import re
from typing import Any

from tests.scripted_server import Body

_TOWER = re.compile(r"The tower of (\w+) (\d+)\s+has (\d+) steps and (\d+) windows\.")
_BELL = "Its bell rings at noon."


def document(manner: str, number: int, *, towers: int = 12) -> str:
    """A line for each tower. What a line says of its tower stands nowhere else."""
    lines = []
    for tower in range(towers):
        steps = 100 * number + tower
        lines.append(f"The tower of {manner} {tower} has {steps} steps and {2 * tower} windows. {_BELL}\n")
    return "\n".join(lines)


def answer(body: Body) -> str | dict[str, Any]:
    prompt = body["messages"][0]["content"]
    return _written(prompt) if prompt.startswith("Write up to") else _judged(prompt)


def fault(body: Body, attempt: int) -> str | None:
    prompt = body["messages"][0]["content"]
    step = "write" if prompt.startswith("Write up to") else "judge"
    return "400" if f"tower of refused_{step}" in prompt else None


def _written(prompt: str) -> str | dict[str, Any]:
    """Questions on the first two towers of a chunk."""
    towers = list(_TOWER.finditer(prompt))
    manner = towers[0][1]
    text = "\n".join(_pair(tower, manner) for tower in (towers * 2)[: 3 if manner == "many" else 2])
    match manner:
        case "prose":
            return "I would rather not."
        case "nothing":
            return "NONE"
        case "cut":
            return {"content": text, "finish_reason": "length"}
    return text


def _pair(tower: re.Match[str], manner: str) -> str:
    _, number, steps, _ = tower.groups()
    question = f"How many steps has the tower {number}?"
    given, evidence = f"It has {steps} steps.", tower[0]
    match manner:
        case "points":
            question = f"Which tower {number} does the given passage describe?"
        case "empty":
            given = " "
        case "wrong":
            given = "It has 7 steps."
        case "half" if int(number) % 2:
            given = "It has 7 steps."
        case "invented":
            evidence = evidence.replace("windows", "doors")
        case "repeated":
            evidence = _BELL
        case "reflowed":
            evidence = evidence.replace(" has ", "\n  has ")
    return f"<question>{question}</question>\n<answer>{given}</answer>\n<evidence>{evidence}</evidence>"


def _judged(prompt: str) -> str:
    """Whether the number in the answer is in the evidence."""
    evidence, _, rest = prompt.partition("The question:")
    given = re.search(r"It has (\d+) steps", rest)
    assert given is not None, prompt
    if "tower of off_scale" in evidence:
        return "Verdict: likely"
    return f"I looked.\nVerdict: {'' if f'has {given[1]} steps' in evidence else 'un'}supported"
