"""The requests for the responses that `generate` writes, and the rows of these responses."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from megatron_post.inference.journal import key_of
from megatron_post.inference.request import Refusal, Reply, Request, messages_as_json
from megatron_post.storage.files import read_lines
from megatron_post.storage.reading import reading


class _SampleMessage(BaseModel):
    role: str
    content: str


class _Sample(BaseModel, strict=True):
    """The keys of a row of responses that other commands need. A row may have more keys."""

    prompt: int
    sample: int
    checkpoint: str
    seed: int
    tokens: int
    finish: str
    messages: list[_SampleMessage] = Field(min_length=1)


@dataclass(frozen=True)
class Draw:
    """One response to one prompt. prompt: the prompt's number. model, scope: parts of the journal's key."""

    prompt: int
    sample: int
    request: Request
    checkpoint: str
    model: str
    scope: tuple[str, ...]

    @cached_property
    def key(self) -> str:
        return key_of(model=self.model, scope=self.scope, **self.request.as_json())

    def row(self, answer: Reply | Refusal) -> dict[str, Any]:
        """The row of the output, or a row of the failures for a refusal."""
        draw = {"prompt": self.prompt, "sample": self.sample, "checkpoint": self.checkpoint}
        if isinstance(answer, Refusal):
            return draw | {"reason": answer.reason}
        message = replace(answer.message, content=answer.text.strip())
        return draw | {
            "seed": self.request.seed,
            "tokens": answer.tokens,
            "finish": answer.finish,
            "messages": messages_as_json([*self.request.messages, message]),
        }


def sample_seed(seed: int, prompt: int, sample: int) -> int:
    """A seed below 2^63 for one response. The seeds of different responses are unrelated."""
    digest = hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `generate` has written. Raises `ValueError` for other rows."""
    rows = list(read_lines(path))
    for number, row in enumerate(rows, start=1):
        with reading(f"{path}:{number}: no sample"):
            _Sample.model_validate(row)
    return rows
