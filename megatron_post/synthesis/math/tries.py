"""What the recipes of mathematics share: tries at a problem, their steps and answers, a judge's verdicts."""

import re
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from megatron_post.data.dialog import Message
from megatron_post.inference.model import Refused
from megatron_post.inference.request import Reply
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.task import Task

_BOX = "\\boxed{"
_STEP = re.compile(r"^(?:#+ *)?Step +(\d{1,4}):", re.MULTILINE)
_VERDICT = re.compile(r"Step (\d{1,4}): (right|wrong)")


@dataclass(frozen=True)
class Try:
    """A whole solution with a final answer. steps: its text, cut where steps begin."""

    message: Message
    answer: str
    steps: tuple[str, ...] = ()


T = TypeVar("T", bound=Try)
R = TypeVar("R")


def boxed_answer(text: str) -> str | None:
    """What the last `\\boxed{...}` of a text holds, or None where there is none or it is blank."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOX)
    for place in range(begin, len(text)):
        if text[place - 1] == "\\" and text[place] in "{}":
            continue
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[begin:place].strip() or None
    return None


def steps_of(text: str) -> tuple[str, ...]:
    """The steps of a text, which begin with "Step 1:", "Step 2:" and so on, each at the start of a line.

    What comes before the first step belongs to it. Empty if the numbers are others.
    """
    found = list(_STEP.finditer(text))
    if [int(match[1]) for match in found] != list(range(1, len(found) + 1)):
        return ()
    starts = [0, *(match.start() for match in found[1:]), len(text)]
    return tuple(text[a:b].strip() for a, b in pairwise(starts)) if found else ()


def step_verdicts(text: str, steps: int) -> list[bool] | None:
    """A judge's verdict on each step, from the last lines of its reply: "Step 1: right", "Step 2: wrong".

    None if it is off this scale: another word, a step too many or too few, or another order.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [_VERDICT.fullmatch(line) for line in lines[-steps:]]
    more = len(lines) > steps and _VERDICT.fullmatch(lines[-steps - 1])
    if more or [match and int(match[1]) for match in found] != list(range(1, steps + 1)):
        return None
    return [match is not None and match[2] == "right" for match in found]


def column(row: Mapping[str, Any], name: str, *, key: str) -> str:
    """The text, or the number as text, in a column. Raises `ValueError` if there is none.

    key: of the settings, which names the column.
    """
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        found = f"the row has {', '.join(row)}" if name not in row else f"it holds {value!r:.80}"
        raise ValueError(f"settings.{key}={name}: this column has no text: {found}")
    return value.strip()


def known_answer(row: Mapping[str, Any], name: str | None, after: str, *, key: str) -> str | None:
    """The answer in a column, without its box. None if there is no such column, or no value in it.

    after: the text that the answer follows, such as "####". Empty: the column is the answer.
    """
    if name is None or row.get(name) is None:
        return None
    text = column(row, name, key=key)
    if after:
        _, mark, text = text.rpartition(after)
        if not mark or not text.strip():
            raise ValueError(f"settings.{key}={name}: {after!r} and an answer are not in it")
    if boxed := boxed_answer(text):
        return boxed
    if "\n" in text.strip():
        raise ValueError(
            f"settings.{key}={name}: it holds {text.strip()!r:.80}, which is more than an answer: name the "
            f"text that the answer follows in settings.{key}_after"
        )
    return text.strip().removeprefix("$").removesuffix("$").strip()


async def unless_refused(task: Task[Any], *work: Awaitable[R]) -> list[R | None]:
    """The results of several requests in order, None for those that the model refuses.

    Raises `Refused` if it refuses all.
    """

    refusals: list[Refused] = []

    async def result(one: Awaitable[R]) -> R | None:
        try:
            return await one
        except Refused as refused:
            refusals.append(refused)
            return None

    found = await task.together(*(result(one) for one in work))
    if refusals and len(refusals) == len(found):
        raise min(refusals, key=lambda refused: refused.key)  # the order of the list depends on times
    return found


async def ask_judge(task: Task[Any], step: str, prompt: str) -> str | None:
    """The judge's reply. None if it is cut off, which the report counts. Raises `Refused`."""
    reply = await task.ask(step, prompt, model="judge", temperature=0.0, top_p=1.0)
    if reply.finish != "stop":
        task.count(step, "cut off")
        return None
    return reply.text


async def tries_at(
    task: Task[Any], step: str, prompt: str | Sequence[Message], *, samples: int, in_steps: bool
) -> list[Try]:
    """The whole ones among `samples` replies, which have a final answer in a box, and steps if wanted.

    The report counts the others. Raises `Refused` if the model refuses each.
    """
    asked = (task.ask(step, prompt, seed=seed) for seed in range(samples))
    replies = await unless_refused(task, *asked)
    return [found for reply in replies if reply and (found := whole_try(task, step, reply, in_steps))]


def whole_try(task: Task[Any], step: str, reply: Reply, in_steps: bool) -> Try | None:
    """The try in a reply. Where there is none, the report counts why."""
    answer, steps = boxed_answer(reply.text), steps_of(reply.text) if in_steps else ()
    if reply.finish != "stop":
        task.count(step, "cut off")
    elif answer is None:
        task.count(step, "no final answer")
    elif in_steps and not steps:
        task.count(step, "not in steps")
    else:
        return Try(reply.message, answer, steps)
    return None


def without_repeats(task: Task[Any], step: str, tries: Sequence[T]) -> list[T]:
    """The tries without those that repeat the text of another, which the report counts."""
    found: dict[str, T] = {}
    for one in tries:
        if found.setdefault(one.message.content, one) is not one:
            task.count(step, "repeat of another reply")
    return list(found.values())


async def with_answer(task: Task[Any], tries: Sequence[T], answer: str) -> list[T]:
    """The tries that have this answer."""
    found = await task.together(*(task.compare("answers", answer, one.answer) for one in tries))
    return [one for one, result in zip(tries, found, strict=True) if result == "same"]


async def majority(task: Task[Any], tries: Sequence[T], *, least: float) -> list[T]:
    """The largest group of tries with one answer. The first try's answer stands for the group.

    least: tries that it must have. Empty if it has fewer, or if another group is as large.
    """
    groups: list[list[T]] = []
    for one in tries:
        for group in groups:
            if await task.compare("answers", group[0].answer, one.answer) == "same":
                group.append(one)
                break
        else:
            groups.append([one])
    groups.sort(key=len, reverse=True)
    if not groups or len(groups[0]) < least or (len(groups) > 1 and len(groups[1]) == len(groups[0])):
        return []
    return groups[0]


async def agreeing(
    task: Task[Any], tries: Sequence[T], known: str | None, *, samples: int, agreement: float
) -> list[T]:
    """The tries with the known answer, or with the answer of at least this share of all samples.

    Raises `Dropped` if there are none.
    """
    if not tries:
        raise Dropped("no reply is a whole solution with a final answer")
    if known is None:
        if not (found := await majority(task, tries, least=agreement * samples)):
            raise Dropped("no answer has the majority")
    elif not (found := await with_answer(task, tries, known)):
        raise Dropped("no solution has the known answer")
    return found


async def judged_steps(task: Task[Any], problem: str, one: Try) -> list[bool] | None:
    """The judge's verdict on each step, by the prompt `judge`. None if there is none. Raises `Refused`."""
    prompt = task.prompt("judge", problem=problem, steps=one.steps)
    text = await ask_judge(task, "judge", prompt)
    if text is None:
        return None
    verdicts = step_verdicts(text, len(one.steps))
    if verdicts is None:
        task.count("judge", "off scale")
    else:
        task.count("judge", "all steps right" if all(verdicts) else "a step is wrong")
    return verdicts


async def passing_judge(task: Task[Any], problem: str, tries: Sequence[T]) -> list[T]:
    """The tries of which the judge finds each step right.

    Raises `Dropped` if there are none, and `Refused` if the judge refuses each.
    """
    verdicts = await unless_refused(task, *(judged_steps(task, problem, one) for one in tries))
    found = [one for one, verdict in zip(tries, verdicts, strict=True) if verdict and all(verdict)]
    if not found:
        raise Dropped("the judge passes no solution")
    return found
