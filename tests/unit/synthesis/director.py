"""System prompts, and a scripted author and judge. A word of the system prompt selects how they act."""

import json
import re
from typing import Any

from tests.scripted_server import Body

_MANNER = re.compile(r"for (\w+) guests")
MANNERS = ("good", "obedient", "lasting", "tiring", "curt", "many", "disobedient", "prose", "loose", "faulty")
SHORT, LONG = "It is blue.", "It is blue because the light of the sun is scattered in the air above us."


def seed(manner: str, kind: str = "length") -> dict[str, Any]:
    """A seed, from which the author writes two system prompts of this manner."""
    return {"kind": kind, **_prompt(manner, kind, 9)}


def _prompt(manner: str, kind: str, words: int) -> dict[str, Any]:
    if kind == "tone":
        return {"system": f"You speak kindly for {manner} guests, as number {words} does.", "rules": {}}
    system = f"You answer in at most {words} words for {manner} guests."
    return {"system": system, "rules": {"most_words": words}}


def answer(body: Body) -> str | dict[str, Any]:
    messages = body["messages"]
    prompt, seed = messages[0]["content"], body["seed"]
    found = _MANNER.search(prompt)
    manner = found[1] if found else "without"
    match prompt.split()[:4]:
        case ["Write", "up", "to", _]:
            kind = "tone" if "You speak kindly" in prompt else "length"
            return _written(manner, kind)
        case ["A", "system", "prompt", "tells"]:
            return f"I compared.\nVerdict: {'different' if manner == 'loose' else 'same'}"
        case ["You", "play", "a", "user"]:
            turn = 1 + prompt.count("\nThe assistant:")
            cut = {"content": "Why", "finish_reason": "length"}
            return (
                cut if manner == "curt" and turn == 2 else f"Why is the sky of {manner} blue, number {turn}?"
            )
        case ["You", "check", "whether", "the"]:
            return _judged(prompt, manner)
    asked = messages[-1]["content"]
    assert asked.startswith("Why is the sky"), asked
    named = re.search(r"sky of (\w+) blue, number (\d)", asked)
    assert named is not None
    return _answered(named[1], int(named[2]), seed, is_steered=messages[0]["role"] == "system")


def fault(body: Body, attempt: int) -> str | None:
    prompt = body["messages"][0]["content"]
    if "for interrupted guests" in prompt and "\nThe assistant:" in prompt and prompt.startswith("You play"):
        return "400"
    return "400" if "for refused guests" in prompt and prompt.startswith("A system prompt tells") else None


def _written(manner: str, kind: str) -> str | dict[str, Any]:
    good = [_prompt(manner, kind, words) for words in (8, 7)]
    match manner:
        case "prose":
            return "I would rather not."
        case "object":
            return f"```json\n{json.dumps(good[0])}\n```"
        case "broken":
            return "```json\n[{]\n```"
        case "stopped":
            return {"content": f"```json\n{json.dumps(good)}", "finish_reason": "length"}
        case "faulty":
            unstated = {**good[0], "rules": {"most_words": 5}}
            without = {**good[0], "rules": {}}
            unknown = {**good[0], "rules": {"syllables": 5}}
            good = [unstated, without, unknown, "Be brief."]
        case "many":
            repeated = _prompt(manner, kind, 9)
            good = [repeated, *good, good[0], _prompt(manner, kind, 6)]
    return f"Here they are.\n```json\n{json.dumps(good)}\n```"


def _answered(manner: str, turn: int, seed: int, *, is_steered: bool) -> str | dict[str, Any]:
    """LONG breaks every rule on the length. The author answers LONG without the system prompt."""
    if not is_steered:
        return SHORT if manner == "lasting" else LONG
    match manner:
        case "disobedient":
            return LONG
        case "tiring" if turn == 2:
            return LONG
        case "cut":
            return {"content": SHORT, "finish_reason": "length"}
        case "unclear":
            return "It is blue-ish, I say, to-day-and-ever."
        case "obedient" | "lasting":
            return SHORT
    return LONG if seed == 0 else f"It is blue, says {seed}."


def _judged(prompt: str, manner: str) -> str:
    """Short answers have a kind tone. The second sample is unhelpful if the manner is `unhelpful`."""
    given = prompt.partition("The last reply:")[2]
    if manner == "off_scale":
        return "Verdict: maybe"
    if manner == "unhelpful" and "says 1" in given:
        return "Verdict: unhelpful"
    return f"I read it.\nVerdict: {'breaks' if LONG in given else 'follows'}"
