"""Summaries of long documents, made from summaries of their parts, and questions that need several parts."""

import re
from typing import Any

from pydantic import Field

from megatron_post.config.section import Count
from megatron_post.data.dialog import Message
from megatron_post.synthesis.code.programs import whole_text
from megatron_post.synthesis.columns import column
from megatron_post.synthesis.judge import verdict
from megatron_post.synthesis.long.tokens import DocumentSettings, chunks_of, measured, trainable
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.replies import unless_refused
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task

VERSION = 1
MODELS = ("author", "judge")
_WORDINGS = 3  # of the request for a summary
_QUESTION = re.compile(
    r"<question>(.*?)</question>\s*<answer>(.*?)</answer>\s*<parts>\s*(\d{1,4}(?:\s*,\s*\d{1,4})*)\s*</parts>",
    re.DOTALL,
)
_NUMBER = re.compile(r"\d[\d,]*\d")  # of two digits or more, because single digits number lists


class Settings(DocumentSettings):
    questions: Count = Field(2, description="questions on a document that need several parts, at most")
    needed: Count = Field(3, description="parts that such a question needs, or all of a document with fewer")
    shorter: float = Field(
        0.5, gt=0, lt=1, description="a summary of a chunk has fewer tokens than this share of it"
    )


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    document = trainable(column(row, task.settings.text, key="text"))
    chunks = chunks_of(document, task.settings)
    works = (_summary(task, "summarize", [chunk.text.strip()]) for chunk in chunks)
    parts = await task.together(*works)
    found = await unless_refused(task, _summarized(task, document, parts), _asked(task, document, parts))
    rows = [row for rows in found if rows for row in rows]
    if not rows:
        raise Dropped("neither the summary nor a question passes the checks")
    return rows


async def _summary(task: Task[Settings], step: str, texts: list[str]) -> str:
    """Raises `Dropped` for a summary that is not whole, or not shorter than its text."""
    summary = whole_text(await task.ask(step, task.prompt(step, texts=texts)), "a summary")
    share = task.settings.shorter if step == "summarize" else 1.0
    if _tokens(task, summary) >= share * _tokens(task, *texts):
        raise Dropped("a summary is not shorter than its text")
    return summary


async def _summarized(task: Task[Settings], document: str, parts: list[str]) -> list[Row]:
    """The row of the whole summary: summaries of summaries, until one is left."""
    texts = parts
    while len(texts) > 1:
        groups = _groups(task, texts)
        if len(groups) == len(texts):
            raise Dropped("two summaries are longer than a chunk")
        works = (_summary(task, "merge", group) if len(group) > 1 else _same(group[0]) for group in groups)
        texts = await task.together(*works)
    if not _numbers(texts[0]) <= _numbers(document):
        task.count("merge", "a number that the document does not have")
        return []
    content = task.prompt("ask_summary", document=document, wording=task.random.randrange(_WORDINGS))
    return [_row(task, content, texts[0], "summary", {"parts": len(parts)})]


async def _asked(task: Task[Settings], document: str, parts: list[str]) -> list[Row]:
    """Rows of the questions that need several parts. The report counts what is wrong with the others."""
    count, needed = task.settings.questions, min(task.settings.needed, len(parts))
    reply = await task.ask("questions", task.prompt("questions", parts=parts, count=count, needed=needed))
    found = [] if reply.finish != "stop" else _QUESTION.findall(reply.text)
    if not found:
        task.count("questions", "no question" if reply.finish == "stop" else "cut off")
        return []
    for _ in found[count:]:
        task.count("questions", "more questions than asked for")
    works = (_checked(task, document, parts, *map(str.strip, each)) for each in found[:count])
    return [row for row in await unless_refused(task, *works) if row]


async def _checked(
    task: Task[Settings], document: str, parts: list[str], question: str, answer: str, named: str
) -> Row | None:
    """The row of a question whose answer all parts support, and that no part answers alone."""
    numbers = sorted({int(number) for number in named.split(",")})
    fault = (
        "question or answer is empty"
        if not question or not answer
        else "a part that does not exist"
        if numbers[0] < 1 or numbers[-1] > len(parts)
        else "too few parts are needed"
        if len(numbers) < min(task.settings.needed, len(parts))
        else ""
    )
    if fault:
        task.count("questions", fault)
        return None
    judged = task.prompt("judge", parts=parts, question=question, answer=answer)
    if await verdict(task, "judge", judged, ("supported", "unsupported")) != "supported":
        return None
    prompts = [task.prompt("alone", part=part, question=question) for part in parts]
    scale = ("enough", "not enough")
    alone = await task.together(*(verdict(task, "alone", prompt, scale) for prompt in prompts))
    if set(alone) != {"not enough"}:
        return None
    content = task.prompt("ask", document=document, question=question)
    return _row(task, content, answer, "question", {"parts": len(parts), "needed": numbers})


def _row(task: Task[Settings], content: str, answer: str, kind: str, extra: dict[str, Any]) -> Row:
    messages = [Message("user", content), Message("assistant", answer)]
    extra = measured(messages, task.settings) | extra
    return Row(messages, capability="long_context", kind=kind, extra=extra, unique=content)


def _groups(task: Task[Settings], texts: list[str]) -> list[list[str]]:
    """Neighbours together, as many as a chunk has room for."""
    groups: list[list[str]] = []
    room = 0
    for text in texts:
        tokens = _tokens(task, text)
        if not groups or tokens > room:
            groups.append([])
            room = task.settings.chunk
        groups[-1].append(text)
        room -= tokens
    return groups


async def _same(text: str) -> str:
    return text


def _tokens(task: Task[Settings], *texts: str) -> int:
    return sum(map(len, task.settings.own_tokenizer.encode_batch(texts)))


def _numbers(text: str) -> set[str]:
    return {found.replace(",", "") for found in _NUMBER.findall(text)}
