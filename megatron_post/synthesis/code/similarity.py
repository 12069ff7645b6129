"""How alike two programs are: by their syntax trees in Python, and by their tokens in other languages."""

import json
from collections import Counter
from typing import Any

from megatron_post.sandbox.languages import Language
from megatron_post.synthesis.code.scripts import parse_python
from megatron_post.synthesis.code.tokens import tokens
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.task import Task

_RUN = 3  # labels that are compared together


async def labels_of(task: Task[Any], language: Language, source: str) -> list[str]:
    """What a program is compared by. Python is parsed for it, inside the sandbox.

    Raises `Dropped` for Python that does not parse.
    """
    if language != "python":
        return [
            f"word {token.text}" if token.kind == "word" else token.text
            for token in tokens(language, source)
            if token.kind != "comment"
        ]
    outcome = await parse_python(task, "syntax_tree", "syntax_tree.py", source)
    if not outcome.ok:
        raise Dropped("the code has no syntax tree", f"{outcome.kind}: {outcome.stderr[-300:]}")
    return [str(label) for label in json.loads(outcome.stdout)]


def similarity(one: list[str], other: list[str]) -> float:
    """From 0 to 1: the share of runs of three labels that the two have in common (Dice's coefficient).

    The order of functions hardly matters, and the time is linear. Words that only one of them has are names
    that it gives, and all count as the same word.
    """
    first, second = (_runs(labels, set(one) & set(other)) for labels in (one, other))
    return 2 * (first & second).total() / (first.total() + second.total())


def _runs(labels: list[str], common: set[str]) -> Counter[tuple[str, ...]]:
    known = [label if label in common or not label.startswith("word ") else "word" for label in labels]
    ends = [""] * (_RUN - 1)
    known = [*ends, *known, *ends]
    return Counter(tuple(known[start : start + _RUN]) for start in range(len(known) - _RUN + 1))
