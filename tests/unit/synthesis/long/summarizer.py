"""An author who summarizes documents on towers in the manner that the towers' names say, and a judge."""

import re
from typing import Any

from tests.scripted_server import Body

_TOWER = re.compile(r"The tower of (\w+) (\d+)\s+has (\d+) steps")
_SUMMARY = re.compile(r"On (\w+): towers (\d+) to (\d+), (\d+) to (\d+) steps\.")
_STEPS = {  # by how a prompt begins
    "Summarize this part": "summarize",
    "These are summaries": "merge",
    "Write up to": "questions",
    "You check answers": "judge",
    "This is one part": "alone",
}


def answer(body: Body) -> str | dict[str, Any]:
    prompt = body["messages"][0]["content"]
    manner, step = _manner(prompt), _step(prompt)
    found = _TOWER.findall(prompt) if step == "summarize" else _SUMMARY.findall(prompt)
    text = _of_towers(found) if step == "summarize" else _of_summaries(found)
    match step, manner:
        case "summarize", "cut":
            return {"content": text, "finish_reason": "length"}
        case "summarize", "silent":
            return " "
        case "summarize", "long":
            return prompt
        case "merge", "invented" | "fancy":
            return f"{text} They are 98,765 years old."
        case "questions", _:
            return _questions(manner, len(found))
        case "judge", _:
            return f"Verdict: {'un' if 'wrong' in prompt.partition('The answer:')[2] else ''}supported"
        case "alone", _:
            return _alone(prompt, manner)
    return text


def fault(body: Body, attempt: int) -> str | None:
    prompt = body["messages"][0]["content"]
    return "400" if _manner(prompt) == f"refused_{_step(prompt)}" else None


def _step(prompt: str) -> str:
    return next(step for begin, step in _STEPS.items() if prompt.startswith(begin))


def _manner(prompt: str) -> str:
    found = _TOWER.search(prompt) or _SUMMARY.search(prompt)
    assert found is not None, prompt
    return found[1]


def _of_towers(found: list[tuple[str, str, str]]) -> str:
    (manner, first, least), (_, last, most) = found[0], found[-1]
    return f"On {manner}: towers {first} to {last}, {least} to {most} steps."


def _of_summaries(found: list[tuple[str, ...]]) -> str:
    return f"On {found[0][0]}: towers {found[0][1]} to {found[-1][2]}, {found[0][3]} to {found[-1][4]} steps."


def _questions(manner: str, parts: int) -> str | dict[str, Any]:
    question, given, numbers = "How do the towers differ from first to last?", "By their steps.", "3, 1,2"
    match manner:
        case "prose" | "fancy":
            return "I would rather not."
        case "few":
            numbers = "1, 2, 2"
        case "absent":
            numbers = f"1, 2, {parts + 1}"
        case "empty":
            question = ""
        case "wrong":
            given = "The answer is wrong."
    text = f"<question>{question}</question>\n<answer>{given}</answer>\n<parts>{numbers}</parts>\n"
    if manner == "many":
        text = text * 2 + text.replace("How", "In what")
    return {"content": text, "finish_reason": "length" if manner == "endless" else "stop"}


def _alone(prompt: str, manner: str) -> str:
    if manner == "one_part" and "towers 0 to" in prompt:
        return "Verdict: enough"
    return "It depends." if manner == "off_scale" else "Verdict: not enough"
