"""Rewards of rows, from files that `megatron-post score` wrote or from a number in each row."""

import math
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from megatron_post.config.rewards import Reward, score_of
from megatron_post.config.section import Line, Name, Section
from megatron_post.curation.row import Row
from megatron_post.curation.step import Batch, RowPass, Values
from megatron_post.storage.checksums import sha256_of_file
from megatron_post.storage.files import read_lines
from megatron_post.storage.reading import plain_file

CAPABILITY = "capability"


class ScoresOf(Section):
    """Where the scores of one reward model are."""

    column: Line | None = Field(None, description="key of the rows that has the score as a number")
    files: dict[Line, Name] = Field(
        default_factory=dict, description="source -> file of scores that `megatron-post score` wrote of it"
    )

    @model_validator(mode="after")
    def _is_somewhere(self) -> "ScoresOf":
        if (self.column is None) == (not self.files):
            raise ValueError("give either column or files")
        return self


def scores_pass(name: str, rewards: Sequence[Reward], scores: Mapping[str, ScoresOf]) -> RowPass:
    """A pass with the fields `score_fields` of each reward, and CAPABILITY, which a row may have as a key.

    A row without a score, or with a score that is no finite number, has null. Raises `ValueError` for a file
    that does not exist.
    """
    files = {path for each in scores.values() for path in each.files.values()}
    readers = {
        field: _Scores(reward, scores[model])
        for reward in rewards
        for model, field in zip(reward.models, score_fields(reward), strict=True)
    }
    return RowPass(
        name=name,
        version=1,
        settings={
            "rewards": [[reward.name, list(reward.models), reward.of_steps] for reward in rewards],
            "scores": {model: each.model_dump(mode="json") for model, each in scores.items()},
            "files": {path: sha256_of_file(plain_file(Path(path), "scores:")) for path in sorted(files)},
        },
        fields={**{field: pa.float64() for field in readers}, CAPABILITY: pa.string()},
        annotate=lambda batch: _annotate(batch, readers),
    )


def score_fields(reward: Reward) -> list[str]:
    """The names of the fields with the scores of a reward's models."""
    return [f"{reward.name}/{model}" for model in reward.models]


class _Scores:
    """The scores of one model for the rows of all sources."""

    def __init__(self, reward: Reward, place: ScoresOf) -> None:
        self._reward, self._place = reward, place

    def of(self, row: Row) -> float | None:
        """The score of a row, or None. Raises `ValueError` for a damaged file."""
        if self._place.column is not None:
            value = _number(row.values.get(self._place.column))
            return None if value is None or math.isnan(value) else value
        if row.source not in self._by_source:
            return None
        numbers, scores = self._by_source[row.source]
        place = int(np.searchsorted(numbers, row.number))
        if place == len(numbers) or numbers[place] != row.number or math.isnan(scores[place]):
            return None
        return float(scores[place])

    @cached_property
    def _by_source(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The numbers of rows with a score, ascending int64, and their scores, float64, of each source."""
        return {source: self._read(Path(path)) for source, path in self._place.files.items()}

    def _read(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        numbers, values = array("q"), array("d")
        for line, row in enumerate(read_lines(path), start=1):
            number: Any = row.get("row")
            if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 2**63:
                raise ValueError(f"{path}:{line}: no number of a row: {str(row)[:100]}")
            numbers.append(number)
            values.append(_best(row, self._reward, origin=f"{path}:{line}"))
        order = np.argsort(numbers, kind="stable")
        ascending = np.array(numbers, np.int64)[order]
        if (np.diff(ascending) == 0).any():
            raise ValueError(f"{path}: a row has two scores; give the scores of one file of rows")
        return ascending, np.array(values, np.float64)[order]


def _best(line: Mapping[str, Any], reward: Reward, *, origin: str) -> float:
    """The score of a dialog, or that of the best response of a preference, which `score` writes first.

    A score that is no finite number gives NaN.
    """
    found = line.get(reward.of_steps or "scores")
    value = _number(found[0]) if isinstance(found, list) and found else None
    return score_of(line, reward, origin=origin) if value is None else value


def _number(value: Any) -> float | None:
    """A finite number, NaN for one that is not finite, or None for another value."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else math.nan


def _annotate(batch: Batch, readers: Mapping[str, _Scores]) -> Values:
    named = [row.values.get(CAPABILITY) for row in batch.rows]
    capabilities = [name if isinstance(name, str) else None for name in named]
    scores = {field: [reader.of(row) for row in batch.rows] for field, reader in readers.items()}
    return {**scores, CAPABILITY: capabilities}
