"""Permutations that depend only on a key, and not on the machine, a library's version or a random state."""

import hashlib

import numpy as np


def permutation(count: int, *key: int | str) -> np.ndarray:
    """A pseudo-random order of `count` items, int64 [count]. The same key always gives the same order.

    Items are sorted by SplitMix64 (Steele, Lea and Flood, 2014) of their index, seeded by a hash of the key.
    NumPy's shuffles may change between releases (NEP 19). A run that resumes with another release would then
    repeat some packs and skip others.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.frombuffer(digest, dtype="<u8")
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable")
