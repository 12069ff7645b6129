"""Questions on passages of long documents, with the whole document as context and the evidence's place."""

import re
from typing import Any

from pydantic import Field

from megatron_post.config.section import Count
from megatron_post.data.dialog import Message
from megatron_post.synthesis.columns import column
from megatron_post.synthesis.judge import verdict
from megatron_post.synthesis.long.tokens import (
    Chunk,
    DocumentSettings,
    chunks_of,
    found_once,
    measured,
    token_span,
    trainable,
)
from megatron_post.synthesis.questions import points_at_passage
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.replies import unless_refused
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task

VERSION = 1
MODELS = ("author", "judge")
_PAIR = re.compile(
    r"<question>(.*?)</question>\s*<answer>(.*?)</answer>\s*<evidence>(.*?)</evidence>", re.DOTALL
)
_NONE = "NONE"


class Settings(DocumentSettings):
    chunks: Count = Field(2, description="chunks of a document that are asked about, drawn at random")
    questions: Count = Field(2, description="questions on a chunk, at most")


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    settings = task.settings
    document = trainable(column(row, settings.text, key="text"))
    chunks = chunks_of(document, settings)
    drawn = sorted(task.random.sample(range(len(chunks)), min(settings.chunks, len(chunks))))
    works = (_of_chunk(task, document, chunks[number], f"{number + 1}/{len(chunks)}") for number in drawn)
    rows = [row for found in await unless_refused(task, *works) if found for row in found]
    if not rows:
        raise Dropped("no question on the document passes the checks")
    return rows


async def _of_chunk(task: Task[Settings], document: str, chunk: Chunk, place: str) -> list[Row]:
    """The rows of one chunk. place: which one it is. The report counts what is wrong with the others."""
    count = task.settings.questions
    reply = await task.ask("write", task.prompt("write", text=chunk.text.strip(), count=count))
    pairs = [[part.strip() for part in found] for found in _PAIR.findall(reply.text)]
    if reply.finish != "stop":
        task.count("write", "cut off")
        return []
    if not pairs:
        task.count("write", "nothing to ask about" if reply.text.strip() == _NONE else "no question")
        return []
    for _ in pairs[count:]:
        task.count("write", "more questions than asked for")
    works = (_checked(task, document, chunk, place, *pair) for pair in pairs[:count])
    return [row for row in await unless_refused(task, *works) if row]


async def _checked(
    task: Task[Settings], document: str, chunk: Chunk, place: str, question: str, answer: str, evidence: str
) -> Row | None:
    """The row of a question whose evidence is found and whose answer the judge finds in it."""
    settings = task.settings
    span = found_once(evidence, chunk.text)
    fault = (
        "question or answer is empty"
        if not question or not answer
        else "the question points at its passage"
        if points_at_passage(question)
        else "the evidence is not in the chunk exactly once"
        if span is None
        else "the evidence is in the document several times"
        if found_once(evidence, document) is None
        else ""
    )
    if fault or span is None:
        task.count("evidence", fault)
        return None
    task.count("evidence", "found")
    values = {"evidence": chunk.text[slice(*span)], "question": question, "answer": answer}
    if (
        await verdict(task, "judge", task.prompt("judge", **values), ("supported", "unsupported"))
        != "supported"
    ):
        return None
    content = task.prompt("ask", document=document, question=question)
    start = content.index(document) + chunk.start + span[0]
    end = start + span[1] - span[0]
    messages = [Message("user", content), Message("assistant", answer)]
    where = {"characters": [start, end], "tokens": token_span(start, end, content, settings.own_tokenizer)}
    extra = measured(messages, settings) | {"chunk": place, "evidence": {"text": content[start:end], **where}}
    return Row(messages, capability="long_context", kind="question", extra=extra, unique=content)
