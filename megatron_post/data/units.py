"""Rendered units, held compactly: what must stay in one pack, and its segments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from megatron_post.data.template import Rendered, TokenRole

Lengths = TypeVar("Lengths", int, np.ndarray)


@dataclass(frozen=True)
class Units:
    """U units of S segments of T tokens. A dialog is a unit of one segment, a pair's responses one of
    several.

    tokens: int32 [T]; roles: uint8 [T]; segment_starts: int64 [S + 1]; unit_starts: int64 [U + 1], in
    segments; ranks: int32 [S], see `Pack`; responses: int32 [S], tokens of the final response; sources:
    int32, samples: uint64, turns: int32 [U].
    """

    tokens: np.ndarray
    roles: np.ndarray
    segment_starts: np.ndarray
    unit_starts: np.ndarray
    ranks: np.ndarray
    responses: np.ndarray
    sources: np.ndarray
    samples: np.ndarray
    turns: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def segment_lengths(self) -> np.ndarray:
        """Real tokens of each segment, int64 [S]."""
        return np.diff(self.segment_starts)

    def lengths(self, *, multiple: int) -> np.ndarray:
        """Tokens of each unit when every segment is padded to `multiple`, int64 [U]."""
        return np.diff(_starts(round_up(self.segment_lengths, multiple))[self.unit_starts])

    def segments_of(self, units: np.ndarray) -> np.ndarray:
        """The segments of `units` (int [n], repeats allowed), one unit after another: int64."""
        counts = np.diff(self.unit_starts)[units]
        within = np.arange(counts.sum()) - np.repeat(_starts(counts)[:-1], counts)
        return np.repeat(self.unit_starts[:-1][units], counts) + within


class UnitPile:
    """Collects units, then makes `Units` of them. Every few thousand segments are joined, to save memory."""

    def __init__(self) -> None:
        self._loose: list[Rendered] = []
        self._blocks: list[Rendered] = []
        self._segments: list[tuple[int, int, int]] = []  # length, response length, rank
        self._units: list[tuple[int, int, int, int]] = []  # segments, source, sample, turns

    def __len__(self) -> int:
        return len(self._units)

    def add(
        self,
        unit: Sequence[Rendered],
        *,
        source: int,
        sample: int,
        turns: int,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Add a unit of one or more segments that `sample`, a row number of `source`, became."""
        self._loose.extend(unit)
        for segment, rank in zip(unit, ranks or [-1] * len(unit), strict=True):
            self._segments.append((len(segment), response_length(segment.roles), rank))
        self._units.append((len(unit), source, sample, turns))
        if len(self._loose) >= 4096:
            self._blocks.append(_joined(self._loose))
            self._loose.clear()

    def units(self) -> Units:
        """All units so far."""
        whole = _joined([*self._blocks, *self._loose])
        segments = np.array(self._segments, dtype=np.int64).reshape(-1, 3)
        units = np.array(self._units, dtype=np.uint64).reshape(-1, 4)
        return Units(
            tokens=whole.tokens,
            roles=whole.roles,
            segment_starts=_starts(segments[:, 0]),
            unit_starts=_starts(units[:, 0].astype(np.int64)),
            ranks=segments[:, 2].astype(np.int32),
            responses=segments[:, 1].astype(np.int32),
            sources=units[:, 1].astype(np.int32),
            samples=units[:, 2],
            turns=units[:, 3].astype(np.int32),
        )


def response_length(roles: np.ndarray) -> int:
    """Tokens of the final response: body and terminator after the last header; none where it is masked.

    roles: uint8 [n].
    """
    others = np.flatnonzero(~np.isin(roles, (TokenRole.BODY, TokenRole.TERMINATOR)))
    return len(roles) - 1 - int(others[-1]) if len(others) else len(roles)


def round_up(lengths: Lengths, multiple: int) -> Lengths:
    """The smallest multiples that are no less than `lengths`."""
    return -(-lengths // multiple) * multiple


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _joined(parts: Sequence[Rendered]) -> Rendered:
    tokens = [np.zeros(0, dtype=np.int32), *(part.tokens for part in parts)]
    roles = [np.zeros(0, dtype=np.uint8), *(part.roles for part in parts)]
    return Rendered(np.concatenate(tokens), np.concatenate(roles))
