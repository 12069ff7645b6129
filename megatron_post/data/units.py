"""Holds rendered units in columns. A unit is the segments that must stay in one pack."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from megatron_post.data.template import RESPONSE_ROLES, Rendered

Lengths = TypeVar("Lengths", int, np.ndarray)

# One record for each segment and for each unit, as `Units` describes them.
SEGMENT = np.dtype([("length", "<i4"), ("response", "<i4"), ("rank", "<i4")])
UNIT = np.dtype([("segments", "<i4"), ("source", "<i4"), ("turns", "<i4"), ("sample", "<u8")])
TOKEN_BYTES = 5  # an int32 id and a uint8 role


class Content(Protocol):
    """The tokens and roles of segments as bytes. A segment of n tokens is n int32 ids, then n uint8 roles."""

    def __getitem__(self, part: slice) -> np.ndarray:
        """A range of bytes, uint8 [n]."""


@dataclass(frozen=True)
class UnitBlock:
    """Rendered units in three arrays, which can be written to files and appended to each other.

    content: bytes as in `Content`. segments: `SEGMENT` [S]. units: `UNIT` [U].
    """

    content: bytes
    segments: np.ndarray
    units: np.ndarray


@dataclass(frozen=True)
class Units:
    """U units with S segments. `units_of` makes them.

    Tokens and roles may be in a file, and only the other arrays take memory. A dialog or a solution in steps
    is a unit of one segment. A preference is a unit of several segments.
    """

    content: Content
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

    def read(self, segment: int, first: int = 0, last: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int32 [n]) and roles (uint8 [n]) of a segment, or of its tokens from `first` to `last`."""
        start, end = self.segment_starts[segment : segment + 2].tolist()
        last = end - start if last is None else last
        ids = TOKEN_BYTES * start
        roles = ids + 4 * (end - start)
        tokens = self.content[ids + 4 * first : ids + 4 * last].view("<i4")
        return tokens, self.content[roles + first : roles + last]


def units_of(content: Content, segments: np.ndarray, units: np.ndarray) -> Units:
    """The units of a block, or of blocks that were appended to each other. Arguments as for `UnitBlock`."""
    return Units(
        content=content,
        segment_starts=_starts(segments["length"]),
        unit_starts=_starts(units["segments"]),
        ranks=segments["rank"],
        responses=segments["response"],
        sources=units["source"],
        samples=units["sample"],
        turns=units["turns"],
    )


class UnitPile:
    """Collects units in memory."""

    def __init__(self) -> None:
        self._content: list[bytes] = []
        self._segments: list[tuple[int, int, int]] = []
        self._units: list[tuple[int, int, int, int]] = []

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
        for segment in unit:
            self._content += [segment.tokens.tobytes(), segment.roles.tobytes()]
            self._segments.append((len(segment), response_length(segment.roles), segment.rank))
        self._units.append((len(unit), source, turns, sample))

    def block(self) -> UnitBlock:
        """All units so far, as they are written to files."""
        return UnitBlock(
            b"".join(self._content),
            np.array(self._segments, dtype=SEGMENT),
            np.array(self._units, dtype=UNIT),
        )

    def units(self) -> Units:
        """All units so far, in memory."""
        block = self.block()
        return units_of(np.frombuffer(block.content, dtype=np.uint8), block.segments, block.units)


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
