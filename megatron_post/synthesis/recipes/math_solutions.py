"""Step-by-step solutions of mathematical problems, filtered by their answer and by a judge of each step."""

from typing import Any

from pydantic import Field

from megatron_post.config.section import Count, Name, Section
from megatron_post.data.dialog import Message
from megatron_post.synthesis.columns import column
from megatron_post.synthesis.math.tries import (
    agreeing,
    known_answer,
    passing_judge,
    tries_at,
    without_repeats,
)
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task

VERSION = 1
MODELS = ("author", "judge")
ANSWERS = True


class Settings(Section):
    problem: Name = Field("problem", description="column of the problem")
    answer: Name | None = Field("answer", description="column of the known answer, if a row has one")
    answer_after: str = Field("", description="text in that column that the answer follows, such as ####")
    samples: Count = Field(8, description="K, number of solutions that are requested")
    agreement: float = Field(
        0.5, gt=0, le=1, description="share of the samples that must agree if no answer is known"
    )
    keep: Count = Field(4, description="largest number of solutions that are kept of a problem")


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    settings = task.settings
    problem = column(row, settings.problem, key="problem")
    known = known_answer(row, settings.answer, settings.answer_after, key="answer")
    prompt = task.prompt("solve", problem=problem)
    tries = await tries_at(task, "solve", prompt, samples=settings.samples, in_steps=True)
    agreed = await agreeing(task, tries, known, samples=settings.samples, agreement=settings.agreement)
    right = await passing_judge(task, problem, without_repeats(task, "solve", agreed))
    return [
        Row(
            [Message("user", problem), one.message],
            capability="math",
            kind="majority" if known is None else "known_answer",
            extra={
                "problem": problem,
                "answer": known or agreed[0].answer,
                "agreement": len(agreed) / settings.samples,
            },
        )
        for one in right[: settings.keep]
    ]
