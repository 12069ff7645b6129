"""Solutions with steps that are labelled right or wrong by rollouts from each prefix, and by a judge."""

from typing import Any, Literal

from pydantic import Field

from megatron_post.config.section import Count, Name, Section
from megatron_post.synthesis.columns import column
from megatron_post.synthesis.math.tries import (
    Try,
    judged_steps,
    known_answer,
    tries_at,
    with_answer,
    without_repeats,
)
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.replies import unless_refused
from megatron_post.synthesis.row import StepLabels
from megatron_post.synthesis.task import Task

VERSION = 1
MODELS = ("author", "judge")
ANSWERS = True


class Settings(Section):
    problem: Name = Field("problem", description="column of the problem")
    answer: Name = Field("answer", description="column of the known answer")
    answer_after: str = Field("", description="text in that column that the answer follows, such as ####")
    solutions: Count = Field(4, description="solutions of a problem whose steps are labelled")
    rollouts: Count = Field(8, description="N, completions of each prefix of a solution")
    labels: Literal["rollouts", "judge"] = Field(
        "rollouts", description="which labels are in `labels` of a row. Both are in the row"
    )


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[StepLabels]:
    settings = task.settings
    problem = column(row, settings.problem, key="problem")
    answer = known_answer(row, settings.answer, settings.answer_after, key="answer")
    if answer is None:
        raise Dropped("no answer is known")
    prompt = task.prompt("solve", problem=problem)
    tries = await tries_at(task, "solve", prompt, samples=settings.solutions, in_steps=True)
    if not tries:
        raise Dropped("no reply is a whole solution with a final answer")
    different = without_repeats(task, "solve", tries)
    rows = await unless_refused(task, *(_labelled(task, problem, answer, one) for one in different))
    found = [row for row in rows if row]
    if not found:
        raise Dropped("the judge labels no solution")
    return found


async def _labelled(task: Task[Settings], problem: str, answer: str, one: Try) -> StepLabels | None:
    """A solution with both kinds of labels. None if the judge's labels are used and it gives none."""
    verdicts = await judged_steps(task, problem, one)
    if verdicts is None and task.settings.labels == "judge":
        return None
    soft = await task.together(
        *(_share_right(task, problem, answer, one.steps[:end]) for end in range(1, len(one.steps)))
    )
    is_right = bool(await with_answer(task, [one], answer))
    soft.append(float(is_right))  # the last step has the final answer
    hard = [share > 0 for share in soft]
    return StepLabels(
        prompt=problem,
        completions=one.steps,
        labels=hard if task.settings.labels == "rollouts" or verdicts is None else verdicts,
        capability="math",
        kind="right_answer" if is_right else "wrong_answer",
        extra={"answer": answer, "soft_labels": soft, "rollout_labels": hard, "judge_labels": verdicts},
    )


async def _share_right(task: Task[Settings], problem: str, answer: str, steps: tuple[str, ...]) -> float:
    """The share of the rollouts from these first steps that reach the answer.

    A rollout that is cut off or has no final answer does not reach it.
    """
    prompt = task.prompt("continue", problem=problem, steps=steps)
    rollouts = task.settings.rollouts
    tries = await tries_at(task, "continue", prompt, samples=rollouts, in_steps=False)
    return len(await with_answer(task, tries, answer)) / rollouts
