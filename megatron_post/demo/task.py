"""The demo's task: arithmetic word problems in chat form, whose answers a program can check.

A response works digit by digit, ones before tens, and ends in "The answer is 62." The carry or the borrow is
a one beside the digits:

    37+25: 7+5=12, 3+2+1=6, so 62. The answer is 62.
    52-27: 12-7=5, 5-2-1=2, so 25. The answer is 25.

Each turn of a training dialog has one of two styles at random. One shows the working, the other says only
"The answer is 62." A model that imitates both is often brief, and then often wrong. This leaves room for
alignment.

Held-out problems have new numbers. A hash assigns each pair of operands to training or to the held-out side,
whatever its story. So no operation of a held-out problem occurs in training.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from megatron_post.demo.stories import FOLLOW_UPS, NAMES, STORIES, SYSTEM_PROMPTS, THINGS, Story

Side = Literal["train", "held_out"]
Sign = Literal["+", "-"]
Chat = list[dict[str, str]]

_HELD_OUT_SHARE = 0.15
_BRIEF_SHARE = 0.5
_ANSWER = re.compile(r"The answer is (0|[1-9]\d*)\.\Z")


@dataclass(frozen=True)
class Difficulty:
    """The difficulty of problems. Harder problems leave more errors for later rounds to learn from.

    smallest: no number in a question is below it. Numbers of one digit are harder to copy. largest: no number
    in a question or in its working exceeds it (at most 99, which has two digits). operations: the most
    operations in a question. follow_ups: the most follow-up questions.
    """

    smallest: int = 10
    largest: int = 99
    operations: int = 2
    follow_ups: int = 2

    def __post_init__(self) -> None:
        if not (1 <= self.smallest <= self.largest // 3 and 20 <= self.largest <= 99):
            raise ValueError(
                f"smallest={self.smallest}, largest={self.largest}: choose largest from 20 to 99, because "
                "the working has two digits, and smallest from 1 to a third of it, because sums of three "
                "must fit"
            )
        if not 1 <= self.operations <= 2 or self.follow_ups < 0:
            raise ValueError(
                f"operations={self.operations}, follow_ups={self.follow_ups}: choose 1 or 2 operations and 0 "
                "or more follow-ups"
            )


@dataclass(frozen=True)
class Operation:
    """left + right or left - right, of numbers from 0 to 99."""

    left: int
    sign: Sign
    right: int

    @property
    def result(self) -> int:
        return self.left + self.right if self.sign == "+" else self.left - self.right

    @property
    def side(self) -> Side:
        """The side that these numbers belong to. a + b and b + a belong to the same side."""
        pair = sorted((self.left, self.right)) if self.sign == "+" else [self.left, self.right]
        digest = hashlib.sha256(f"{self.sign} {pair}".encode()).digest()
        return "held_out" if int.from_bytes(digest[:4], "big") < _HELD_OUT_SHARE * 2**32 else "train"

    def worked(self) -> str:
        """The working in columns, ones before tens."""
        (tens, ones), (other_tens, other_ones) = divmod(self.left, 10), divmod(self.right, 10)
        if self.sign == "+":
            carry = ones + other_ones >= 10
            first = f"{ones}+{other_ones}={ones + other_ones}"
            second = f"{tens}+{other_tens}{'+1' if carry else ''}={tens + other_tens + carry}"
        else:
            borrow = ones < other_ones
            first = f"{ones + 10 * borrow}-{other_ones}={ones + 10 * borrow - other_ones}"
            second = f"{tens}-{other_tens}{'-1' if borrow else ''}={tens - other_tens - borrow}"
        return f"{self.left}{self.sign}{self.right}: {first}, {second}, so {self.result}."


@dataclass(frozen=True)
class Problem:
    """A chat that ends with a question, with its solution.

    messages: the chat in OpenAI's form, from an optional system prompt to the last user message. Earlier
    turns are answered. operations: every operation of every turn, in order. solution: a correct response that
    shows its working. answer: its number. is_brief: whether its training dialog ends without the working.
    """

    messages: tuple[dict[str, str], ...]
    operations: tuple[Operation, ...]
    solution: str
    answer: int
    is_brief: bool

    @property
    def dialog(self) -> Chat:
        """The chat with a correct response at its end, in either style. It is a row to train on."""
        response = _conclusion(self.answer) if self.is_brief else self.solution
        return [*self.messages, {"role": "assistant", "content": response}]

    @property
    def turns(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)


def parse_answer(text: str) -> int | None:
    """The number of a response that ends in "The answer is N.", else None."""
    match = _ANSWER.search(text.strip())
    return int(match[1]) if match else None


def shows_working(text: str) -> bool:
    """Whether a response has more than its conclusion."""
    return "=" in text


def check_answer(problem: Problem, text: str) -> bool:
    """Whether a response ends with the right answer in the right form. The working is not judged."""
    return parse_answer(text) == problem.answer


def make_problems(
    count: int, *, side: Side, seed: int, difficulty: Difficulty | None = None
) -> list[Problem]:
    """Distinct problems of one side. The same arguments give the same problems."""
    rng = random.Random(f"{seed}/{side}")
    problems: dict[tuple[str, ...], Problem] = {}
    while len(problems) < count:
        problem = _make_problem(rng, side, difficulty or Difficulty())
        if problem is not None:
            questions = tuple(m["content"] for m in problem.messages if m["role"] == "user")
            problems.setdefault(questions, problem)
    return list(problems.values())


def write_dialogs(problems: Iterable[Problem], path: Path) -> None:
    """JSON lines of `{"messages": [...]}`, as OpenAI and TRL write them."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": problem.dialog}) + "\n" for problem in problems)


def write_prompts(problems: Iterable[Problem], path: Path) -> None:
    """JSON lines of prompt, answer and solution, as `megatron-post generate` and `round` read them."""
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            row = {"prompt": problem.messages, "answer": problem.answer, "solution": problem.solution}
            file.write(json.dumps(row) + "\n")


def _make_problem(rng: random.Random, side: Side, difficulty: Difficulty) -> Problem | None:
    """A problem, or None if its first turns leave no numbers for the next one (as 2 - b does)."""
    follow_ups = rng.randint(0, difficulty.follow_ups)
    allowed = [
        s for s in STORIES if len(_signs(s)) <= difficulty.operations and (s.goes_on or not follow_ups)
    ]
    stories = [rng.choice(allowed), *rng.choices(FOLLOW_UPS, k=follow_ups)]
    name, friend = rng.sample(NAMES, 2)
    words = {"name": name, "friend": friend, "things": rng.choice(THINGS)}
    system = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.3 else []
    messages, operations, amount = system, [], None
    for story in stories:
        drawn = _draw(rng, story, amount, side, difficulty)
        if drawn is None:
            return None
        numbers, steps = drawn
        amount = steps[-1].result
        operations += steps
        messages.append({"role": "user", "content": story.text.format(**words, **numbers)})
        solution = " ".join([*(step.worked() for step in steps), _conclusion(amount)])
        is_brief = rng.random() < _BRIEF_SHARE
        messages.append({"role": "assistant", "content": _conclusion(amount) if is_brief else solution})
    messages.pop()
    assert amount is not None
    return Problem(tuple(messages), tuple(operations), solution, amount, is_brief)


def _conclusion(answer: int) -> str:
    return f"The answer is {answer}."


def _draw(
    rng: random.Random, story: Story, start: int | None, side: Side, difficulty: Difficulty
) -> tuple[dict[str, int], list[Operation]] | None:
    """Numbers for a story, and its operations. None if the first numbers leave none for the next.

    start: the amount that a follow-up starts from, or None if the story gives its own.
    """
    first, *rest = story.plan.split()
    amount = rng.randint(difficulty.smallest, difficulty.largest) if start is None else start
    numbers, operations = {first: amount}, []
    for mark, letter in zip(rest[::2], rest[1::2], strict=True):
        sign: Sign = "+" if mark == "+" else "-"
        fitting = _operands(amount, sign, side, difficulty)
        if letter in numbers:
            fitting = tuple(number for number in fitting if number == numbers[letter])
        if not fitting:
            return None
        numbers[letter] = rng.choice(fitting)
        operations.append(Operation(amount, sign, numbers[letter]))
        amount = operations[-1].result
    return numbers, operations


@cache
def _operands(amount: int, sign: Sign, side: Side, difficulty: Difficulty) -> tuple[int, ...]:
    """Numbers that may follow. The operation belongs to `side`, and its result is from 0 to the largest."""
    numbers = range(difficulty.smallest, difficulty.largest + 1)
    operations = [Operation(amount, sign, number) for number in numbers]
    return tuple(o.right for o in operations if 0 <= o.result <= difficulty.largest and o.side == side)


def _signs(story: Story) -> Sequence[str]:
    return story.plan.split()[1::2]
