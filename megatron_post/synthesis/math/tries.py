"""Shared parts of the recipes for mathematics, such as tries at a problem and verdicts of a judge."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_post.data.dialog import Message
from megatron_post.data.step_example import steps_of
from megatron_post.inference.request import Reply
from megatron_post.synthesis.columns import column
from megatron_post.synthesis.judge import ask_judge
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.replies import unless_refused
from megatron_post.synthesis.task import Task

_BOX = "\\boxed{"
_VERDICT = re.compile(r"Step (\d{1,4}): (right|wrong)")


@dataclass(frozen=True)
class Try:
    """A complete solution with a final answer. steps: its text, split into steps."""

    message: Message
    answer: str
    steps: tuple[str, ...] = ()


T = TypeVar("T", bound=Try)


def boxed_answer(text: str) -> str | None:
    """The content of the last `\\boxed{...}` of a text, or None if there is none or it is blank."""
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


def step_verdicts(text: str, steps: int) -> list[bool] | None:
    """A judge's verdict on each step, from the last lines of its reply, such as "Step 1: right".

    None if the reply is off this scale, because of another word, another number of steps or another order.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [_VERDICT.fullmatch(line) for line in lines[-steps:]]
    more = len(lines) > steps and _VERDICT.fullmatch(lines[-steps - 1])
    if more or [match and int(match[1]) for match in found] != list(range(1, steps + 1)):
        return None
    return [match is not None and match[2] == "right" for match in found]


def known_answer(row: Mapping[str, Any], name: str | None, after: str, *, key: str) -> str | None:
    """The answer in a column, without its box. None if there is no such column, or no value in it.

    after: the text that the answer follows, such as "####". If it is empty, the column is the answer. Raises
    `ValueError` if the column has no answer, or more text than an answer.
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


async def tries_at(
    task: Task[Any], step: str, prompt: str | Sequence[Message], *, samples: int, in_steps: bool
) -> list[Try]:
    """The complete solutions among `samples` replies, with a final answer in a box.

    in_steps: whether they must have numbered steps. The report counts the other replies. Raises `Refused` if
    the model refuses all requests.
    """
    asked = (task.ask(step, prompt, seed=seed) for seed in range(samples))
    replies = await unless_refused(task, *asked)
    return [found for reply in replies if reply and (found := whole_try(task, step, reply, in_steps))]


def whole_try(task: Task[Any], step: str, reply: Reply, in_steps: bool) -> Try | None:
    """The try in a reply. If there is none, this returns None and the report counts the reason."""
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
    """The tries without those that repeat the text of an earlier one. The report counts the repeats."""
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
    """The largest group of tries with the same answer. A group is compared by its first answer.

    least: the smallest size of the group. The result is empty if the group is smaller, or if another group is
    as large.
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
    """The tries with the known answer. If it is not known, those with the answer of the majority.

    agreement: share of all samples that the majority must have. Raises `Dropped` if there are no such tries.
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
    """The judge's verdict on each step, or None if its reply has none. Uses the prompt `judge`.

    Raises `Refused`.
    """
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
    """The tries whose steps are all right according to the judge.

    Raises `Dropped` if there are none, and `Refused` if the judge refuses all requests.
    """
    verdicts = await unless_refused(task, *(judged_steps(task, problem, one) for one in tries))
    found = [one for one, verdict in zip(tries, verdicts, strict=True) if verdict and all(verdict)]
    if not found:
        raise Dropped("the judge passes no solution")
    return found
