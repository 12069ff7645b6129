"""Measures the similarity of two programs by their syntax trees in Python, and otherwise by their tokens."""

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
    """The labels by which a program is compared. A Python program is parsed inside the sandbox.

    Raises `Dropped` for a Python program that cannot be parsed.
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
    """The share of runs of three labels that two programs have in common, from 0 to 1 (Dice's coefficient).

    The order of functions hardly matters, and the time is linear. A word that only one program has is a name
    that the program defines. All such words count as the same word.
    """
    first, second = (_runs(labels, set(one) & set(other)) for labels in (one, other))
    return 2 * (first & second).total() / (first.total() + second.total())


def _runs(labels: list[str], common: set[str]) -> Counter[tuple[str, ...]]:
    known = [label if label in common or not label.startswith("word ") else "word" for label in labels]
    ends = [""] * (_RUN - 1)
    known = [*ends, *known, *ends]
    return Counter(tuple(known[start : start + _RUN]) for start in range(len(known) - _RUN + 1))
