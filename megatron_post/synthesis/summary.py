"""Counts the results of all input rows by step and by reason, for the report."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from megatron_post.storage.files import write_json
from megatron_post.storage.reading import read_object, reading
from megatron_post.synthesis.parts import Result
from megatron_post.synthesis.row import is_preference, readable_messages

_MOST_REASONS = 200  # reasons, or kinds, that are counted separately
_SAMPLES = 3  # samples of each kind, and of each reason
_LONGEST = 6000  # characters of a text in a sample
_OTHERS = "(others)"


class Step(BaseModel):
    """Counts of one step.

    rows: input rows that reached the step. results: counts of everything but requests. These are the kinds of
    outcomes of programs, the results of comparisons of answers, and what a recipe counts itself.
    """

    rows: int = 0
    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    results: Counter[str] = Field(default_factory=Counter)
    dropped: int = 0
    failed: int = 0


class Reason(BaseModel):
    """Rows that were dropped at a step for one reason. examples: "source: detail" of the first rows."""

    step: str
    reason: str
    failed: bool
    rows: int = 0
    examples: list[str] = []


class Measure(BaseModel):
    """The distribution of a number. counts: how often each value comes, rounded down to two decimals."""

    number: int = 0
    total: float = 0.0
    counts: Counter[float] = Field(default_factory=Counter)

    def add(self, value: float) -> None:
        self.number, self.total = self.number + 1, self.total + value
        # The small number is larger than the error of the product, so that 0.29 stays 0.29.
        self.counts[math.floor(value * 100 + 1e-7) / 100] += 1

    @property
    def mean(self) -> float:
        return self.total / self.number


class Summary(BaseModel):
    """Counts of a run.

    input: good input rows; None while more generations may follow. bad: bad ones. kept: input rows that gave
    at least one row, or something for the next generation. preferences: how many of the rows are preferences.
    """

    recipe: str
    version: int
    input: int | None = 0
    bad: int = 0
    bad_examples: list[str] = []
    done: int = 0
    kept: int = 0
    dropped: int = 0
    failed: int = 0
    rows: int = 0
    preferences: int = 0
    kinds: Counter[str] = Field(default_factory=Counter)
    steps: dict[str, Step] = {}
    measures: dict[str, Measure] = {}
    reasons: list[Reason] = []
    samples: dict[str, list[dict[str, Any]]] = {}

    @property
    def requests(self) -> int:
        return sum(step.requests for step in self.steps.values())

    @property
    def prompt_tokens(self) -> int:
        return sum(step.prompt_tokens for step in self.steps.values())

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps.values())

    @property
    def in_words(self) -> str:
        preferences = f" ({self.preferences:,} of them preferences)" if self.preferences else ""
        return (
            f"{self.rows:,} rows{preferences} from {self.kept:,} of {self.done:,} input rows, "
            f"{self.dropped:,} dropped, {self.failed:,} failed"
        )

    def counted(self, results: Iterable[Result]) -> Iterator[Result]:
        """Count results and yield them unchanged. They must come in the order of the input."""
        reasons = {(reason.step, reason.reason, reason.failed): reason for reason in self.reasons}
        for result in results:
            self.done += 1
            self._add_events(result)
            if result.dropped is None:
                self._add_rows(result)
            else:
                self._add_drop(result, reasons)
            yield result

    def _add_events(self, result: Result) -> None:
        for event in result.events:
            step = self.steps.setdefault(event.step, Step())
            if event.model:
                step.requests += 1
                step.refused += event.result == "refusal"
                step.prompt_tokens += event.prompt_tokens
                step.tokens += event.tokens
            else:
                step.results[event.result] += 1
        for name in {event.step for event in result.events}:
            self.steps[name].rows += 1

    def _add_rows(self, result: Result) -> None:
        self.kept += 1
        self.rows += len(result.rows)
        self.preferences += sum(map(is_preference, result.rows))
        for name, value in result.measures:
            self.measures.setdefault(name, Measure()).add(value)
        for row in result.rows:
            kind = " / ".join(filter(None, (row["capability"], row.get("kind"))))
            kind = kind if kind in self.kinds or len(self.kinds) < _MOST_REASONS else _OTHERS
            self.kinds[kind] += 1
            samples = self.samples.setdefault(kind, [])
            if len(samples) < _SAMPLES:
                samples.append(
                    {"id": row["id"], "source": result.source, "messages": _cut(readable_messages(row))}
                )

    def _add_drop(self, result: Result, reasons: dict[tuple[str, str, bool], Reason]) -> None:
        dropped = result.dropped
        assert dropped is not None
        step = self.steps.setdefault(dropped.step, Step())
        if dropped.failed:
            self.failed, step.failed = self.failed + 1, step.failed + 1
        else:
            self.dropped, step.dropped = self.dropped + 1, step.dropped + 1
        key = (dropped.step, dropped.reason, dropped.failed)
        if key not in reasons and len(reasons) >= _MOST_REASONS:
            key = (dropped.step, _OTHERS, dropped.failed)
        if key not in reasons:
            reasons[key] = Reason(step=key[0], reason=key[1], failed=key[2])
            self.reasons.append(reasons[key])
        found = reasons[key]
        found.rows += 1
        if len(found.examples) < _SAMPLES:
            detail = f": {dropped.detail}" if dropped.detail else ""
            found.examples.append(f"{result.source}{detail}"[:_LONGEST])


def write_summary(output: Path, fingerprint: str, summary: Summary) -> None:
    """Write `summary.json`, which marks a run as finished."""
    content = {"fingerprint": fingerprint, "summary": summary.model_dump(mode="json")}
    write_json(output / "summary.json", content)


def read_summary(output: Path, fingerprint: str) -> Summary | None:
    """The summary of a finished run, or None if the run with this fingerprint is not finished."""
    path = output / "summary.json"
    if not path.exists():
        return None
    content = read_object(path, "the summary of a run of a recipe")
    with reading(path, "the summary of a run of a recipe"):
        if content["fingerprint"] != fingerprint:
            return None
        summary = Summary.model_validate(content["summary"])
        for sample in (sample for samples in summary.samples.values() for sample in samples):
            _check(sample)
        return summary


def _check(sample: dict[str, Any]) -> None:
    """Raise `KeyError` or `TypeError` if the report's template would not find a key of a sample."""
    _ = sample["id"], sample["source"]
    for message in sample["messages"]:
        _ = message["role"], message["content"]
        for call in message.get("tool_calls") or []:
            _ = call["function"]["name"], call["function"]["arguments"]


def _cut(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**message, "content": _shortened(message["content"])} for message in messages]


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [{len(text) - _LONGEST:,} more characters]"
