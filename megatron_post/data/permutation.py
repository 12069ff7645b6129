"""Permutations that depend only on a key, and not on the machine, a library's version or a random state."""

import hashlib

import numpy as np

_BLOCK = 2**18  # items that are hashed at a time, so that their keys fit in a core's cache


def permutation(count: int, *key: int | str) -> np.ndarray:
    """A pseudo-random order of `count` items, int64 [count]. The same key always gives the same order.

    Items are sorted by SplitMix64 (Steele, Lea and Flood, 2014) of their index, seeded by a hash of the key.
    NumPy's shuffles may change between releases (NEP 19). A run that resumes with another release would then
    repeat some packs and skip others.
    """
    return np.argsort(_hashes(np.arange(count), _seed(key)), kind="stable")


class Permutation:
    """The items of `permutation` by their position. It sorts only a part of them at a time.

    Items are grouped by the first byte of their hash, which takes one byte an item. A group is sorted when a
    position in it is first used. The first of ten million items is known after 0.2 seconds, and sorting all
    of them takes 5 (on a busy core).
    """

    def __init__(self, count: int, *key: int | str) -> None:
        self._seed = _seed(key)
        self._groups = np.empty(count, dtype=np.uint8)
        for start in range(0, count, _BLOCK):
            block = self._groups[start : start + _BLOCK]
            block[:] = _hashes(np.arange(start, start + len(block)), self._seed) >> np.uint64(56)
        self._ends = np.cumsum(np.bincount(self._groups, minlength=256))
        self._start, self._sorted = 0, np.zeros(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < len(self._groups):
            raise IndexError(f"position {position} of {len(self._groups)} items")
        if not 0 <= position - self._start < len(self._sorted):
            group = int(np.searchsorted(self._ends, position, side="right"))
            items = np.flatnonzero(self._groups == group)
            self._sorted = items[np.argsort(_hashes(items, self._seed), kind="stable")]
            self._start = int(self._ends[group]) - len(items)
        return int(self._sorted[position - self._start])


def _seed(key: tuple[int | str, ...]) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), dtype="<u8")


def _hashes(items: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """SplitMix64 of items (int64 [n]), uint64 [n]. No two items have the same."""
    state = (items + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += seed
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
