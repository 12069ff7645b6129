"""Mathematical problems from documents, kept if several answers to the problem agree."""

import re
from typing import Any

from pydantic import Field

from megatron_post.config.section import Count, Name, Section
from megatron_post.data.dialog import Message
from megatron_post.synthesis.columns import column
from megatron_post.synthesis.judge import ask_judge
from megatron_post.synthesis.math.tries import majority, tries_at
from megatron_post.synthesis.questions import different, plain
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.replies import unless_refused
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task

VERSION = 1
MODELS = ("author", "judge")
ANSWERS = True
_PROBLEM = re.compile(r"<problem>(.*?)</problem>", re.DOTALL)
_NONE = "NONE"
_VERDICTS = {
    "Verdict: answerable": "answerable",
    "Verdict: incomplete": "incomplete",
    "Verdict: ambiguous": "ambiguous",
}


class Settings(Section):
    text: Name = Field("text", description="column of the document")
    questions: Count = Field(3, description="largest number of problems from one document")
    samples: Count = Field(8, description="K, number of solutions of each problem")
    agreement: float = Field(0.75, gt=0, le=1, description="share of the samples that must agree")


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    text = column(row, task.settings.text, key="text")
    count = task.settings.questions
    reply = await task.ask("write", task.prompt("write", text=text, count=count))
    if reply.finish != "stop":
        raise Dropped("the reply is cut off")
    if reply.text.strip() == _NONE:
        raise Dropped("the document has nothing to ask about")
    chosen = different(task, _PROBLEM.findall(reply.text), count, what="problem")
    if not chosen:
        raise Dropped("the reply has no problem")
    rows = [row for row in await unless_refused(task, *(_checked(task, each) for each in chosen)) if row]
    if not rows:
        raise Dropped("no problem of the document passes the checks")
    return rows


async def _checked(task: Task[Settings], problem: str) -> Row | None:
    """The row of a problem, or None if the judge finds it incomplete or if too few answers agree."""
    settings = task.settings
    if not await _is_answerable(task, problem):
        return None
    prompt = task.prompt("solve", problem=problem)
    tries = await tries_at(task, "solve", prompt, samples=settings.samples, in_steps=True)
    agreed = await majority(task, tries, least=settings.agreement * settings.samples)
    if not agreed:
        task.count("answers", "no agreement")
        return None
    return Row(
        [Message("user", problem), agreed[0].message],
        capability="math",
        kind="question",
        extra={
            "problem": problem,
            "answer": agreed[0].answer,
            "agreement": len(agreed) / settings.samples,
        },
        unique=plain(problem),
    )


async def _is_answerable(task: Task[Settings], problem: str) -> bool:
    prompt = task.prompt("screen", problem=problem)
    text = await ask_judge(task, "screen", prompt)
    if text is None:
        return False
    lines = text.strip().splitlines()
    verdict = _VERDICTS.get(lines[-1].strip() if lines else "", "off scale")
    task.count("screen", verdict)
    return verdict == "answerable"
