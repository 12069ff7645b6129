"""Chunks of a long text, the place of a passage in it, and the bucket of a row, in tokens."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import Field, field_validator

from megatron_post.config.data import Source
from megatron_post.config.section import Count, Name, Section
from megatron_post.data.dialog import Dialog, Message
from megatron_post.data.row_formats import example_of_row
from megatron_post.data.template import render
from megatron_post.data.tokenizer import Tokenizer, load_tokenizer
from megatron_post.inference.request import messages_as_json
from megatron_post.synthesis.recipe import Dropped

BUCKETS = (16_384, 32_768, 65_536, 131_072)


class LongSettings(Section):
    """Keys that each recipe for long contexts has."""

    tokenizer: Name = Field(description="tokenizer of the model that is trained, by which all is counted")
    buckets: tuple[Count, ...] = Field(
        BUCKETS, min_length=1, description="lengths of rows in tokens; a row has the smallest that holds it"
    )

    @field_validator("buckets")
    @classmethod
    def _increasing(cls, buckets: tuple[int, ...]) -> tuple[int, ...]:
        if sorted(set(buckets)) != list(buckets):
            raise ValueError("they must increase, such as [16384, 32768]")
        return buckets

    @property
    def own_tokenizer(self) -> Tokenizer:
        """Raises `ValueError` if it cannot be loaded."""
        return _loaded(self.tokenizer)


class DocumentSettings(LongSettings):
    """Keys of the recipes that cut documents into chunks."""

    text: Name = Field("text", description="column of the document")
    chunk: Count = Field(8192, description="tokens of a chunk, at most")
    least_chunks: Count = Field(2, description="chunks that a document must have")


@dataclass(frozen=True)
class Chunk:
    """A part of a document. start, end: its characters in the document."""

    text: str
    start: int
    end: int


@lru_cache(maxsize=1)
def _loaded(path: str) -> Tokenizer:
    return load_tokenizer(path)


def trainable(text: str) -> str:
    """The text. Raises `BadRow` if `data pack` would refuse it, before any model is asked about it."""
    messages = messages_as_json([Message("user", text), Message("assistant", "Yes.")])
    example_of_row({"messages": messages}, Source(name="synthesis", path="rows.jsonl"))
    return text


def chunks_of(text: str, settings: DocumentSettings) -> list[Chunk]:
    """The document in chunks of at most `chunk` tokens, as they are counted in the whole document.

    A chunk ends behind a line of its second half, or behind a word if there is no such line. Raises `Dropped`
    if there are too few chunks, and if the document alone is longer than the largest bucket.
    """
    starts = [start for start, _ in settings.own_tokenizer.places(text)]
    if len(starts) > settings.buckets[-1]:
        raise Dropped("the document is longer than the largest bucket", f"{len(starts):,} tokens")
    found, first = [], 0
    while first < len(starts):
        start, behind = (0 if first == 0 else starts[first]), first + settings.chunk
        end = len(text)
        if behind < len(starts):
            end = _cut(text, starts[first + settings.chunk // 2], starts[behind])
            behind = bisect_left(starts, end)
        found.append(Chunk(text[start:end], start, end))
        first = behind
    if len(found) < settings.least_chunks:
        raise Dropped("the document has too few chunks", f"{len(found)} of {len(starts):,} tokens")
    return found


def _cut(text: str, least: int, most: int) -> int:
    """The last good place to cut after `least` and up to `most`."""
    for mark in ("\n\n", "\n", " "):
        if (place := text.rfind(mark, least, most)) >= 0:
            return place + len(mark)
    return most


def found_once(passage: str, text: str) -> tuple[int, int] | None:
    """The characters at which a passage stands in a text. None if it stands nowhere, or twice.

    White space may differ, because models change line breaks where they quote.
    """
    words = passage.split()
    if not words:
        return None
    pattern = re.compile(r"\s+".join(map(re.escape, words)))
    match = pattern.search(text)
    if match is None or pattern.search(text, match.start() + 1):
        return None
    return match.span()


def token_span(start: int, end: int, text: str, tokenizer: Tokenizer) -> tuple[int, int]:
    """The first of the tokens that hold the characters `start` to `end` of a text, and the one behind."""
    places = tokenizer.places(text)
    first = bisect_right(places, start, key=lambda place: place[1])
    return first, bisect_left(places, end, lo=first, key=lambda place: place[0])


def measured(messages: Sequence[Message], settings: LongSettings) -> dict[str, Any]:
    """`tokens` and `bucket` of a row: its length in the chat format, as `data pack` counts it.

    Raises `Dropped` if it is longer than the largest bucket.
    """
    tokens = len(render(Dialog(tuple(messages)), settings.own_tokenizer))
    bucket = next((bucket for bucket in settings.buckets if tokens <= bucket), None)
    if bucket is None:
        raise Dropped("the row is longer than the largest bucket", f"{tokens:,} tokens")
    return {"tokens": tokens, "bucket": bucket}
