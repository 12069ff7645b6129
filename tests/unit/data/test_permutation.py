"""A permutation by position equals the whole permutation, and neither may change between versions."""

import hashlib

import numpy as np
import pytest

from megatron_post.data import permutation as module
from megatron_post.data.permutation import Permutation, permutation


@pytest.mark.parametrize("count", [1, 2, 23, 5000])
def test_positions_equal_the_whole_order(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of earlier versions sorted everything. They must continue with the same order of packs."""
    monkeypatch.setattr(module, "_BLOCK", 1000)
    whole = permutation(count, 5, "epoch", 2)
    parts = Permutation(count, 5, "epoch", 2)
    assert [parts[position] for position in range(count)] == whole.tolist()
    backwards = [parts[position] for position in reversed(range(count))]
    assert backwards == whole.tolist()[::-1]
    assert sorted(backwards) == list(range(count))


def test_the_order_is_the_one_of_every_earlier_version() -> None:
    """The numbers are SplitMix64's, computed here with Python's integers."""
    seed = int.from_bytes(hashlib.blake2b(b"(5, 'epoch', 0)", digest_size=8).digest(), "little")

    def hashed(item: int) -> int:
        state = (seed + (item + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        return state ^ state >> 31

    assert permutation(300, 5, "epoch", 0).tolist() == sorted(range(300), key=hashed)


def test_a_position_that_does_not_exist() -> None:
    for position in (-1, 4):
        with pytest.raises(IndexError, match=f"position {position} of 4 items"):
            Permutation(4, 1)[position]
    assert len(permutation(0, 1)) == 0 and permutation(0, 1).dtype == np.int64
