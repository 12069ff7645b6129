"""Holds rendered units in a few large arrays. A unit is the segments that must stay in one pack."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from megatron_post.data.template import RESPONSE_ROLES, Rendered

Lengths = TypeVar("Lengths", int, np.ndarray)


@dataclass(frozen=True)
class Units:
    """U units with S segments and T tokens in total.

    A dialog or a solution in steps is a unit of one segment. A preference is a unit of several segments.
    """

    tokens: np.ndarray  # int32 [T]
    roles: np.ndarray  # uint8 [T], `TokenRole`
    segment_starts: np.ndarray  # int64 [S + 1], in tokens
    unit_starts: np.ndarray  # int64 [U + 1], in segments
    ranks: np.ndarray  # int32 [S], see `Pack`
    responses: np.ndarray  # int32 [S], tokens of the final response
    sources: np.ndarray  # int32 [U], index of the source
    samples: np.ndarray  # uint64 [U], row number in the source
    turns: np.ndarray  # int32 [U], number of user messages

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
        """The segments of `units` (int [n], repeats allowed) as int64, one unit after another."""
        counts = np.diff(self.unit_starts)[units]
        within = np.arange(counts.sum()) - np.repeat(_starts(counts)[:-1], counts)
        return np.repeat(self.unit_starts[:-1][units], counts) + within


class UnitPile:
    """Collects units and makes `Units` of them. It joins every few thousand segments to save memory."""

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
    ) -> None:
        """Add the unit that was made of row `sample` of `source`. It has one or more segments."""
        self._loose.extend(unit)
        for segment in unit:
            self._segments.append((len(segment), response_length(segment.roles), segment.rank))
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
    """Tokens of the final response, which is body and terminator after the last header. 0 if it is masked.

    roles: uint8 [n].
    """
    others = np.flatnonzero(~np.isin(roles, RESPONSE_ROLES))
    return len(roles) - 1 - int(others[-1]) if len(others) else len(roles)


def round_up(lengths: Lengths, multiple: int) -> Lengths:
    """Each of `lengths` rounded up to a multiple of `multiple`."""
    return -(-lengths // multiple) * multiple


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _joined(parts: Sequence[Rendered]) -> Rendered:
    tokens = [np.zeros(0, dtype=np.int32), *(part.tokens for part in parts)]
    roles = [np.zeros(0, dtype=np.uint8), *(part.roles for part in parts)]
    return Rendered(np.concatenate(tokens), np.concatenate(roles))
