"""Reads what a run has written about its steps and its starts, however often it was killed."""

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_post.storage.reading import reading

METRICS, STARTS = "metrics.jsonl", "starts.jsonl"


@dataclass
class Metrics:
    """The values of one kind of line by name. A run may have a million steps, so they are kept as arrays."""

    _values: "dict[str, tuple[array[int], array[float]]]" = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self._values)

    def points(self, name: str) -> np.ndarray:
        """Steps and values: float64 [n, 2], by step. A repeated step has its last value."""
        steps, values = (np.array(column) for column in self._values.get(name, ((), ())))
        # `unique` finds the first place of each step, so the last value must come first.
        found, places = np.unique(steps[::-1], return_index=True)
        return np.column_stack([found, values[::-1][places]])

    def add(self, step: int, name: str, value: float) -> None:
        steps, values = self._values.setdefault(name, (array("q"), array("d")))
        steps.append(step)
        values.append(value)


@dataclass(frozen=True)
class History:
    """starts: the lines of `starts.jsonl`. unread: how many lines of both files are incomplete or damaged."""

    train: Metrics
    evaluation: Metrics
    starts: list[dict[str, Any]]
    unread: int


def read_history(run_dir: Path) -> History:
    """The history of a training run. A file that is missing has no lines.

    Raises `ValueError` if a file cannot be read.
    """
    kinds, unread = {"train": Metrics(), "eval": Metrics()}, 0
    for row in _rows(run_dir / METRICS):
        try:
            metrics, step = kinds[row.pop("kind")], _step(row.pop("step"))
            values = {name: _number(value) for name, value in row.items()}
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
            unread += 1
            continue
        for name, value in values.items():
            metrics.add(step, name, value)
    starts = []
    for row in _rows(run_dir / STARTS):
        try:
            starts.append(row | {key: _step(row[key]) for key in ("after", "lost", "ranks")})
        except (LookupError, TypeError, ValueError):
            unread += 1
    return History(kinds["train"], kinds["eval"], starts, unread)


def _rows(path: Path) -> Iterator[Any]:
    """Each line of a file of JSON lines. A line that is not JSON, which a kill may have cut, is None."""
    if not path.is_file():
        return
    with reading(path), path.open("rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield None


def _step(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"{value!r} is not a number of steps")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)
