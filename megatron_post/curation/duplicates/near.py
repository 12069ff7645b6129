"""Near duplicates: dialogs that share most of their n-grams of words.

MinHash (Broder, 1997) finds candidates in time that is linear in rows, and the true Jaccard similarity of
their n-grams decides. rensa makes the signatures. They are cut into bands, and rows that are equal in a band
are candidates (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

PERMUTATIONS = 128
_SEED = 1
_RECALL = 0.99  # least share of pairs at the threshold that become candidates
_MOST_MEMBERS = 256  # kept rows of one band's value that later rows are compared with
_MOST_CANDIDATES = 100  # kept rows that one row is compared with, those with the most equal bands

Spared = Callable[[int, np.ndarray], np.ndarray]


def band_shape(threshold: float) -> tuple[int, int]:
    """The number of bands and the number of hashes in each of them.

    A pair of similarity s is equal in one of b bands of r hashes with probability 1 - (1 - s^r)^b. The bands
    are as long as possible, because long bands have few candidates, as long as this is at least 0.99 at the
    threshold.
    """
    shapes = [(PERMUTATIONS // length, length) for length in range(1, PERMUTATIONS + 1)]
    return next(
        (bands, length)
        for bands, length in reversed(shapes)
        if 1 - (1 - threshold**length) ** bands >= _RECALL or length == 1
    )


def band_hashes(ngrams: Sequence[np.ndarray], *, threshold: float) -> np.ndarray:
    """One hash for each band of each row, uint64 [rows, bands].

    ngrams: the rows' n-grams, uint64, as `words.ngram_hashes` returns them. Rows without words, which have no
    n-grams, are all equal here and should take no part.
    """
    from rensa import RMinHash

    bands, length = band_shape(threshold)
    offsets = np.cumsum([0, *map(len, ngrams)], dtype=np.uint64)
    flat = np.concatenate([*ngrams, np.empty(0, np.uint64)])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, PERMUTATIONS, _SEED)
    signatures = np.array(matrix.to_rows(), np.uint64).reshape(len(ngrams), PERMUTATIONS)
    hashes = np.zeros((len(ngrams), bands), np.uint64)
    for place in range(length):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + signatures[:, place : bands * length : length]
        hashes ^= hashes >> np.uint64(29)
    return hashes


def colliding_rows(bands: Iterable[np.ndarray], takes_part: np.ndarray) -> np.ndarray:
    """The rows that equal another row in a band, int64 [m], in ascending order.

    bands: one array at a time, uint64 [n], the values of all rows in a band. takes_part: bool [n].
    """
    rows = np.flatnonzero(takes_part)
    collides = np.zeros(len(rows), bool)
    for band in bands:
        collides |= _group(band[rows]) >= 0
    return rows[collides]


def band_groups(bands: Iterable[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """The groups of rows that are equal in a band, int64 [m, bands]. -1: no other row is equal there.

    bands: as in `colliding_rows`. rows: int64 [m]. No two bands have a group in common.
    """
    columns, before = [], 0
    for band in bands:
        groups = _group(band[rows])
        columns.append(np.where(groups >= 0, groups + before, -1))
        before += int(groups.max(initial=-1)) + 1
    return np.stack(columns, axis=1) if columns else np.empty((len(rows), 0), np.int64)


def _group(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    names = np.cumsum(counts > 1) - 1
    return np.where(counts[places] > 1, names[places], -1)


class NearDuplicates:
    """Greedy selection: a row is dropped if its similarity to a row that is kept reaches the threshold.

    repeats: int64 [m], for each row the place of the kept row that is most similar; -1 for a kept row.
    similarity: float64 [m], the Jaccard similarity to that row. crowded: bool [m], whether a row has more
    candidates than it is compared with.
    """

    def __init__(
        self,
        groups: np.ndarray,
        order: Iterable[int],
        ngrams: Callable[[int], np.ndarray],
        *,
        threshold: float,
        spared: Spared,
    ) -> None:
        """groups: int64 [m, bands], from `band_groups`. order: its rows, the most important one first.

        ngrams: the n-grams of the row at a place, sorted and distinct. spared: says for a row and other rows,
        int64 [k], which pairs are no duplicates, however similar they are, bool [k].
        """
        self.repeats = np.full(len(groups), -1, np.int64)
        self.similarity = np.zeros(len(groups))
        self.crowded = np.zeros(len(groups), bool)
        self._members: dict[int, list[int]] = {}
        for place in order:
            names = groups[place]
            names = names[names >= 0].tolist()
            others = np.array(self._candidates(place, names), np.int64)
            for other in others[~spared(place, others)].tolist() if len(others) else ():
                found = jaccard(ngrams(place), ngrams(other))
                if found >= threshold and found > self.similarity[place]:
                    self.repeats[place], self.similarity[place] = other, found
            if self.repeats[place] < 0:
                self._keep(place, names)

    def _candidates(self, place: int, names: list[int]) -> list[int]:
        """Kept rows in the same groups, those in the most groups first."""
        members = [self._members.get(name, ()) for name in names]
        counts = Counter(other for group in members for other in group)
        is_full = any(len(group) == _MOST_MEMBERS for group in members)
        self.crowded[place] = is_full or len(counts) > _MOST_CANDIDATES
        return sorted(counts, key=lambda other: (-counts[other], other))[:_MOST_CANDIDATES]

    def _keep(self, place: int, names: list[int]) -> None:
        for name in names:
            members = self._members.setdefault(name, [])
            if len(members) < _MOST_MEMBERS:
                members.append(place)


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """The size of the intersection divided by the size of the union of two sorted sets; 0 for empty sets."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    union = len(first) + len(second) - both
    return both / union if union else 0.0
