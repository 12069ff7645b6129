"""An author for Self-Instruct, whose instructions, labels and examples follow from the prompt."""

import random
import re
from typing import Any

from megatron_post.synthesis.rouge import words_of
from tests.scripted_server import Body

NEW = 8
_LETTERS = "bcdfghklmnprstvw"
_NUMBERED = re.compile(r"^\d+\. (.*)$", re.MULTILINE)
_TASK = re.compile(r"^Task: (.*)$", re.MULTILINE)

# by the place in a reply: what is planted there, beside instructions that are new and good
PLANTED = {
    1: "copy",  # of an instruction in the prompt with so many more words that ROUGE-L is just above 0.7
    2: "far copy",  # as above, and ROUGE-L is just below 0.7, so that it is kept
    3: "keyword",
    5: "near",  # to the instruction before it in this reply
}


def word(chooser: random.Random) -> str:
    return "".join(chooser.choice(_LETTERS) + chooser.choice("aeiou") for _ in range(3))


def seeds(count: int) -> list[dict[str, Any]]:
    """Seed tasks of eight words. Every second one is a classification."""
    chooser = random.Random(0)
    return [
        {
            "instruction": " ".join(word(chooser) for _ in range(8)),
            "instances": [{"input": "", "output": "one"}],
            "is_classification": number % 2 == 0,
        }
        for number in range(count)
    ]


def answer(body: Body) -> str | dict[str, Any]:
    prompt = body["messages"][-1]["content"]
    if prompt.startswith("Here is a list"):
        return _written(prompt, body["seed"])
    instruction = _TASK.findall(prompt)[-1]
    if prompt.startswith("Is a task"):
        return {"Unsure": "Maybe.", "Label": "Yes."}.get(instruction.partition(" ")[0], "No")
    return _labelled(instruction) if "classification" in prompt else _examples(instruction)


def _written(prompt: str, seed: int) -> str | dict[str, Any]:
    """Eight instructions; every 20th reply is prose, and every 10th is cut off."""
    if seed % 20 == 7:
        return "I would rather not."
    chooser = random.Random(seed)
    shown = _NUMBERED.findall(prompt)[:8]
    lines: list[str] = []
    for place in range(NEW):
        words = [word(chooser) for _ in range(chooser.randint(5, 20))]
        match PLANTED.get(place, ""):
            case "copy":
                line = _longer(shown[place], int(0.8 * len(words_of(shown[place]))), chooser)
            case "far copy":
                line = _longer(shown[place], int(6 / 7 * len(words_of(shown[place]))) + 1, chooser)
            case "keyword":
                line = f"draw {' '.join(words)}"
            case "near":
                line = f"{lines[-1]}, now!"
            case _:
                kind = chooser.choice(["label", "invent", "invent", "explain", "unsure", "broken"])
                line = f"{kind} {' '.join(words)}"
        lines.append(line)
    text = "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=9))
    cut = {"finish_reason": "length"} if seed % 10 == 3 else {}
    return {"content": f"Sure, here they are:\n{text}", **cut}


def _longer(instruction: str, more: int, chooser: random.Random) -> str:
    """With m words of it and k more, ROUGE-L is 2m / (2m + k)."""
    return " ".join([instruction, *(word(chooser) for _ in range(more))])


def _labelled(instruction: str) -> str:
    return f"Class label: yes\nInput: {instruction[-9:]} one\nClass label: no\nInput: {instruction[-9:]} two"


def _examples(instruction: str) -> str:
    if instruction.startswith("Broken"):
        return "Example 1\nInput: a thing\nOutput: one\nExample 2\nInput: a thing\nOutput: another"
    if instruction.startswith("Invent"):
        return f"Output: A text on {instruction[-9:]}"
    return (
        f"Example 1\nInput: {instruction[-9:]}\nOutput: It means this.\n"
        f"Example 2\nInput: the same\nOutput: the same\nExample 3\nInput: this:\nOutput: that\n"
        f"Example 4\nInput: {instruction[-9:]}\nOutput: It means this."
    )
