"""Semantic duplicates in a cluster: greedy selection by cosine (section 4.2.3 of the report)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_post.curation.duplicates.spared import Spare, SpareKeys

CompareTo = Literal["kept", "seen"]

_BLOCK = 1024  # rows that are compared with all earlier ones at a time
_COLUMNS = 16_384  # earlier rows in one matrix product, which bounds the memory of large clusters
_ROUNDING = 1e-4  # of a cosine in float32. Closer to the threshold float64 decides


@dataclass(frozen=True)
class Selection:
    """What greedy selection found in a cluster.

    kept: bool [n]. nearest: int64 [n], the row with the largest cosine among those that a row was compared
    with, -1 if there was none. cosine: float64 [n], this cosine, NaN if there was none. Spared pairs are left
    out of both.
    """

    kept: np.ndarray
    nearest: np.ndarray
    cosine: np.ndarray


def select(
    vectors: np.ndarray,
    keys: SpareKeys,
    *,
    threshold: float,
    compare_to: CompareTo = "kept",
    spare: Spare = (),
) -> Selection:
    """Keep each row whose largest cosine to earlier rows is below the threshold.

    vectors: unit vectors, float [n, dimensions], the row with the highest priority first. keys: their hashes.
    compare_to: `kept` compares with earlier rows that are kept, and `seen` with all earlier rows.

    A block of rows is compared with the earlier rows by matrix products. Then the rows of the block are
    decided one after the other.
    """
    cluster = _Cluster(vectors, keys, threshold, spare)
    count = len(vectors)
    kept = np.ones(count, bool)
    nearest, cosine = np.full(count, -1, np.int64), np.full(count, np.nan)
    for start in range(0, count, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, count))
        earlier = np.flatnonzero(kept[:start]) if compare_to == "kept" else np.arange(start)
        best, where, duplicate = cluster.compare(block, earlier)
        inner, is_far = cluster.matrix(block, block)
        for place, row in enumerate(block):
            among = np.flatnonzero(kept[block[:place]]) if compare_to == "kept" else np.arange(place)
            if len(among):
                closest = among[np.argmax(inner[place, among])]
                if inner[place, closest] > best[place]:
                    best[place], where[place] = inner[place, closest], block[closest]
                duplicate[place] |= not is_far[place, among].all()
            kept[row] = not duplicate[place]
        found = np.isfinite(best)
        nearest[block[found]] = where[found]
        cosine[block[found]] = cluster.exact(block[found], where[found])
    return Selection(kept, nearest, cosine)


class _Cluster:
    """The vectors of a cluster, and how pairs of them are decided."""

    def __init__(self, vectors: np.ndarray, keys: SpareKeys, threshold: float, spare: Spare) -> None:
        vectors = vectors.astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        self._vectors = vectors / np.maximum(norms, np.float32(1e-12))
        self._keys, self._threshold, self._spare = keys, threshold, spare

    def exact(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The cosines of pairs of rows in float64, which depend on no library's order of additions."""
        a, b = self._vectors[first].astype(np.float64), self._vectors[second].astype(np.float64)
        return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1)).clip(1e-12)

    def matrix(self, rows: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosines [rows, others], -inf for spared pairs; and which pairs are no duplicates, bool."""
        cosines = self._vectors[rows] @ self._vectors[others].T
        close = cosines >= self._threshold - _ROUNDING
        first, second = np.nonzero(close)
        spared = self._keys.spared(rows[first], others[second], self._spare)
        cosines[first[spared], second[spared]] = -np.inf
        close[first[spared], second[spared]] = False
        unsure = ~spared & (cosines[first, second] < self._threshold + _ROUNDING)
        first, second = first[unsure], second[unsure]
        close[first, second] = self.exact(rows[first], others[second]) >= self._threshold
        return cosines, ~close

    def compare(self, rows: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The largest cosine of each row, the other row that has it, and whether the row is a duplicate."""
        best, where = np.full(len(rows), -np.inf, np.float32), np.full(len(rows), -1, np.int64)
        duplicate = np.zeros(len(rows), bool)
        for start in range(0, len(others), _COLUMNS):
            some = others[start : start + _COLUMNS]
            cosines, is_far = self.matrix(rows, some)
            closest = np.argmax(cosines, axis=1)
            largest = cosines[np.arange(len(rows)), closest]
            better = largest > best
            best[better], where[better] = largest[better], some[closest][better]
            duplicate |= ~is_far.all(axis=1)
        return best, where, duplicate
