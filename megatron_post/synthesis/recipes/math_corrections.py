"""Dialogs of a wrong solution, feedback on its error and the right solution. Only the last is trained."""

from typing import Any

from pydantic import Field

from megatron_post.config.section import Count, Name, Section
from megatron_post.data.dialog import Message
from megatron_post.synthesis.columns import column
from megatron_post.synthesis.math.tries import (
    Try,
    judged_steps,
    known_answer,
    passing_judge,
    tries_at,
    with_answer,
)
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task

VERSION = 1
MODELS = ("author", "judge")
ANSWERS = True


class Settings(Section):
    problem: Name = Field("problem", description="column of the problem")
    answer: Name = Field("answer", description="column of the known answer")
    answer_after: str = Field("", description="text in that column that the answer follows, such as ####")
    samples: Count = Field(8, description="solutions that are requested to find a wrong one")
    corrections: Count = Field(4, description="corrections of the wrong solution that are requested")


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    settings = task.settings
    problem = column(row, settings.problem, key="problem")
    answer = known_answer(row, settings.answer, settings.answer_after, key="answer")
    if answer is None:
        raise Dropped("no answer is known")
    prompt = task.prompt("solve", problem=problem)
    tries = await tries_at(task, "solve", prompt, samples=settings.samples, in_steps=True)
    if not tries:
        raise Dropped("no reply is a whole solution with a final answer")
    wrong = await _first_wrong(task, tries, answer)
    step = await _wrong_step(task, problem, wrong)
    feedback = task.prompt("feedback", step=step)
    asked = [
        Message("user", prompt),
        wrong.message,
        Message("user", task.prompt("correct", feedback=feedback)),
    ]
    corrected = await tries_at(task, "correct", asked, samples=settings.corrections, in_steps=True)
    right = await with_answer(task, corrected, answer)
    if not right:
        raise Dropped("no correction has the known answer")
    right = await passing_judge(task, problem, right)
    dialog = [Message("user", problem), wrong.message, Message("user", feedback), right[0].message]
    return [
        Row(
            dialog,
            capability="math",
            kind="answer_is_wrong" if step is None else "step_is_wrong",
            extra={"problem": problem, "answer": answer, "wrong_step": step},
        )
    ]


async def _first_wrong(task: Task[Settings], tries: list[Try], answer: str) -> Try:
    """The first try with a different answer. An answer that cannot be compared may be right."""
    for one in tries:
        if await task.compare("answers", answer, one.answer) == "different":
            return one
    raise Dropped("no try is wrong")


async def _wrong_step(task: Task[Settings], problem: str, wrong: Try) -> int | None:
    """The first wrong step, from 1, or None. The judge finds it without knowing the answer."""
    verdicts = await judged_steps(task, problem, wrong)
    return None if verdicts is None or all(verdicts) else verdicts.index(False) + 1
