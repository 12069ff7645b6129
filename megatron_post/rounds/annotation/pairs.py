"""Draws pairs of responses for people to compare. A pair does not show which model wrote a response."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from megatron_post.rounds.candidates import Candidate
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.files import read_lines
from megatron_post.storage.reading import reading

Side = Literal["a", "b"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: str
    content: str


class Pair(BaseModel):
    """What a person sees: the messages of a prompt and two responses. `pair` is a hash of these."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    pair: str
    prompt: list[_Message]
    a: str
    b: str

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class Origin(BaseModel):
    """The key of a pair, which nobody who compares should see: the origin of each response."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    pair: str
    a: dict[str, Any]
    b: dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """Two responses to one prompt, as rows of `generate`."""

    a: dict[str, Any]
    b: dict[str, Any]

    @cached_property
    def pair(self) -> Pair:
        prompt = [{"role": m["role"], "content": m["content"]} for m in self.a["messages"][:-1]]
        a, b = _text(self.a), _text(self.b)
        return Pair(pair=_id(prompt, a, b), prompt=[_Message(**m) for m in prompt], a=a, b=b)

    @property
    def key(self) -> dict[str, Any]:
        return {"pair": self.pair.pair, "a": _origin(self.a), "b": _origin(self.b)}

    @property
    def is_between_checkpoints(self) -> bool:
        return bool(self.a["checkpoint"] != self.b["checkpoint"])


def draw_pairs(rows: Iterable[dict[str, Any]], *, seed: int, most: int | None) -> list[Drawn]:
    """One pair for each prompt in random order, and at most `most` of them.

    rows: responses that `generate` has written. A pair has two complete responses with different texts. They
    are from two checkpoints wherever a prompt has such responses. The same rows, in the same order, and the
    same seed give the same pairs. Raises `ValueError` if no prompt has two responses to compare.
    """
    by_prompt = defaultdict(list)
    for row in rows:
        if Candidate(row, None, None, 0.0).is_whole:
            # A prompt with another system prompt is another prompt, and its responses cannot be compared.
            by_prompt[row["prompt"], json.dumps(row["messages"][:-1])].append(row)
    random = Random(seed)
    drawn: dict[str, Drawn] = {}
    for found in by_prompt.values():
        # Both orders of two responses are there, so this also draws which of them is shown first.
        options = [Drawn(a, b) for a, b in permutations(found, 2) if _text(a) != _text(b)]
        between = [pair for pair in options if pair.is_between_checkpoints]
        if options:
            chosen = random.choice(between or options)
            drawn.setdefault(chosen.pair.pair, chosen)
    if not drawn:
        raise ValueError(
            f"none of {len(by_prompt)} prompts has two different responses to compare that are complete; "
            "draw more samples, or responses of another checkpoint"
        )
    count = len(drawn) if most is None else min(most, len(drawn))
    return random.sample(list(drawn.values()), count)


def read_pairs(path: Path) -> dict[str, Pair]:
    """The pairs of a file by their ids. Raises `ValueError` for other rows, and for a changed pair."""
    pairs = {}
    for number, row in enumerate(read_lines(path), start=1):
        with reading(f"{path}:{number}", "a pair to compare"):
            pair = Pair.model_validate(row)
        if pair.pair != _id(row["prompt"], pair.a, pair.b):
            raise ValueError(
                f"{path}:{number}: pair {pair.pair!r} has other texts than those that were exported; export "
                "the pairs again"
            )
        pairs[pair.pair] = pair
    return pairs


def read_key(path: Path) -> dict[str, Origin]:
    """The origins of pairs by their ids. Raises `ValueError` for other rows."""
    origins = {}
    for number, row in enumerate(read_lines(path), start=1):
        with reading(f"{path}:{number}", "a line of the key"):
            origin = Origin.model_validate(row)
        origins[origin.pair] = origin
    return origins


def _id(prompt: Sequence[dict[str, str]], a: str, b: str) -> str:
    return sha256_of_json({"prompt": prompt, "a": a, "b": b})[:16]


def _origin(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("prompt", "sample", "checkpoint", "seed")}


def _text(row: dict[str, Any]) -> str:
    return str(row["messages"][-1]["content"])
