"""Questions about snippets that a model answers without them. Rows hold correct answers, or refusals."""

import re
from typing import Any

from pydantic import Field, model_validator

from megatron_post.config.section import Count, Name, Section
from megatron_post.data.dialog import Message
from megatron_post.synthesis.columns import column
from megatron_post.synthesis.judge import verdict
from megatron_post.synthesis.questions import different, plain, points_at_document
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.replies import unless_refused, whole_reply
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task

VERSION = 1
MODELS = ("author", "policy", "judge")
_QUESTION = re.compile(r"<question>(.*?)</question>", re.DOTALL)
_NONE = "NONE"
_ROUNDING = 1e-9  # of a share times a number of answers


class Settings(Section):
    text: Name = Field("text", description="column of the snippet")
    questions: Count = Field(2, description="largest number of questions about a snippet")
    samples: Count = Field(8, description="K, number of answers to each question")
    informative: float = Field(
        0.75, gt=0, le=1, description="share of the K answers that must be informative"
    )
    right: float = Field(
        0.75, gt=0, le=1, description="share of the informative answers that must be correct to keep one"
    )
    wrong: float = Field(
        0.75, gt=0, le=1, description="share of the informative answers that must be incorrect for a refusal"
    )

    @model_validator(mode="after")
    def _exclude_each_other(self) -> "Settings":
        if self.right + self.wrong <= 1:
            raise ValueError(
                f"right={self.right} and wrong={self.wrong}: one question could reach both. Their sum must "
                "be above 1"
            )
        return self


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    snippet = column(row, task.settings.text, key="text")
    count = task.settings.questions
    reply = await task.ask("write", task.prompt("write", text=snippet, count=count))
    if reply.finish != "stop":
        raise Dropped("the reply is cut off")
    if reply.text.strip() == _NONE:
        raise Dropped("the snippet has nothing to ask about")
    questions = different(task, _QUESTION.findall(reply.text), count, what="question")
    if not questions:
        raise Dropped("the reply has no question")
    works = (_probed(task, snippet, question) for question in questions)
    rows = [row for row in await unless_refused(task, *works) if row]
    if not rows:
        raise Dropped("no question about the snippet gives a row")
    return rows


async def _probed(task: Task[Settings], snippet: str, question: str) -> Row | None:
    """The row of a question, if the policy's answers are right or wrong often enough."""
    if points_at_document(question):
        task.count("write", "the question refers to its snippet")
        return None
    prompt = task.prompt("screen", text=snippet, question=question)
    if await verdict(task, "screen", prompt, ("clear", "unclear", "unanswered")) != "clear":
        return None
    samples = range(task.settings.samples)
    replies = await unless_refused(
        task, *(task.ask("answer", question, model="policy", seed=seed) for seed in samples)
    )
    answers = [text for reply in replies if reply and (text := whole_reply(task, "answer", reply))]
    judged = await unless_refused(task, *(_judged(task, snippet, question, answer) for answer in answers))
    return await _row(task, question, list(zip(answers, judged, strict=True)))


async def _judged(task: Task[Settings], snippet: str, question: str, answer: str) -> str:
    """The verdict on whether an informative answer is correct. Empty for any other answer."""
    prompt = task.prompt("informative", question=question, answer=answer)
    if await verdict(task, "informative", prompt, ("informative", "uninformative")) != "informative":
        return ""
    prompt = task.prompt("correct", text=snippet, question=question, answer=answer)
    return await verdict(task, "correct", prompt, ("correct", "incorrect", "undecided"))


async def _row(task: Task[Settings], question: str, judged: list[tuple[str, str | None]]) -> Row | None:
    """The row with a correct answer or a refusal, or None. The shares of the verdicts decide.

    judged: each answer with its verdict.
    """
    settings = task.settings
    verdicts = [found for _, found in judged if found]
    right = [answer for answer, found in judged if found == "correct"]
    wrong = verdicts.count("incorrect")
    kind, given = "", ""
    if not verdicts or not _reaches(len(verdicts), settings.informative, settings.samples):
        task.count("outcome", "too few answers are informative")
    elif _reaches(len(right), settings.right, len(verdicts)):
        kind, given = "answer", right[0]  # `task.random` would depend on which question is finished first
    elif _reaches(wrong, settings.wrong, len(verdicts)):
        kind, given = "refusal", await _refusal(task, question)
    else:
        task.count("outcome", "too few answers are correct, and too few are incorrect")
    if not given:
        return None
    task.count("outcome", kind)
    shares = {
        "informative": len(verdicts) / settings.samples,
        "correct": len(right) / len(verdicts),
        "incorrect": wrong / len(verdicts),
    }
    return Row(
        [Message("user", question), Message("assistant", given)],
        capability="factuality",
        kind=kind,
        extra={"shares": {name: round(share, 4) for name, share in shares.items()}},
        unique=plain(question),
    )


def _reaches(count: int, share: float, total: int) -> bool:
    return count >= share * total - _ROUNDING


async def _refusal(task: Task[Settings], question: str) -> str:
    """A reply that says that its author does not know. Empty if the judge finds that it answers."""
    text = whole_reply(task, "refuse", await task.ask("refuse", task.prompt("refuse", question=question)))
    if not text:
        return ""
    prompt = task.prompt("declines", question=question, answer=text)
    return text if await verdict(task, "declines", prompt, ("declines", "answers")) == "declines" else ""
