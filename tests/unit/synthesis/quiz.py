"""Snippets about towers, with a scripted author, policy and judge. A tower's name selects how they act."""

import re
from typing import Any

from tests.scripted_server import Body

SAMPLES = 8
_TOWER = re.compile(r"tower of (\w+) (\d+)")
_STEPS = re.compile(r"has (\d+) steps")
_UNKNOWN = "I do not know how many steps it has."
# numbers of right, wrong and declining answers among eight; the others are cut off
_ANSWERS = {
    "knows": (8, 0, 0),
    "mostly_right": (6, 2, 0),
    "almost_right": (5, 3, 0),
    "right_or_shy": (6, 0, 2),
    "mostly_wrong": (2, 6, 0),
    "almost_wrong": (3, 5, 0),
    "wrong_or_shy": (0, 6, 2),
    "shy": (0, 5, 3),
    "silent": (0, 0, 8),
    "cut": (5, 0, 0),
    "cut_twice": (6, 0, 0),
}
MANNERS = (*_ANSWERS, "undecided", "leaky", "two", "nothing")


def snippet(manner: str, number: int) -> str:
    """What is true of two towers. The policy knows it, and follows its manner where it does not say so."""
    towers = (number, number + 1)
    return "\n".join(f"The tower of {manner} {tower} has {100 + tower} steps." for tower in towers)


def answer(body: Body) -> str | dict[str, Any]:
    prompt, seed = body["messages"][0]["content"], body["seed"]
    found = _TOWER.search(prompt)
    assert found is not None and len(body["messages"]) == 1, prompt
    manner, number = found[1], int(found[2])
    match prompt.split()[:4]:
        case ["Write", "up", "to", _]:
            return _questions(manner, number)
        case ["You", "check", "questions", _]:
            return f"Verdict: {manner if manner in ('unclear', 'unanswered') else 'clear'}"
        case ["You", "read", "an", "answer"]:
            verdict = "informative" if _STEPS.search(prompt) else "uninformative"
            return "Surely informative" if manner == "off_scale" else f"I read it.\nVerdict: {verdict}"
        case ["You", "check", "an", "answer"]:
            text, _, given = prompt.partition("The question:")
            is_right = _STEPS.findall(given)[0] in _STEPS.findall(text)
            verdict = "undecided" if manner == "undecided" else "correct" if is_right else "incorrect"
            return f"I compared.\nVerdict: {verdict}"
        case ["You", "are", "asked", "the"]:
            return f"I am not sure, but it has {100 + number} steps." if manner == "leaky" else _UNKNOWN
        case ["You", "read", "a", "reply"]:
            return f"Verdict: {'answers' if _STEPS.search(prompt) else 'declines'}"
    assert prompt.startswith("How many steps"), prompt
    return _recalled(manner, number, seed)


def fault(body: Body, attempt: int) -> str | None:
    prompt = body["messages"][0]["content"]
    step = (
        "policy"
        if prompt.startswith("How many")
        else "judge"
        if prompt.startswith("You read an")
        else "author"
    )
    return "400" if f"tower of refused_{step}" in prompt else None


def _questions(manner: str, number: int) -> str | dict[str, Any]:
    question = f"<question>How many steps has the tower of {manner} {number}?</question>"
    match manner:
        case "prose":
            return "I would rather not."
        case "nothing":
            return "NONE"
        case "stopped":
            return {"content": question, "finish_reason": "length"}
        case "points":
            return question.replace("How", "According to the text, how")
        case "blank":
            return "<question> </question>"
        case "two":
            return f"{question}\n{question}\n{question.replace(str(number), str(number + 1))}\n" * 2
    return question


def _recalled(manner: str, number: int, seed: int) -> str | dict[str, Any]:
    right, wrong, shy = _ANSWERS.get(manner, (0, SAMPLES, 0) if manner == "leaky" else (SAMPLES, 0, 0))
    if seed < right:
        return f"It has {100 + number} steps, as number {seed} knows."
    if seed < right + wrong:
        return f"It has {7 + seed} steps."
    return _UNKNOWN if seed < right + wrong + shy else {"content": "It has", "finish_reason": "length"}
