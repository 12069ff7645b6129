"""Packing keeps every unit once and never overfills a pack. It is fast and full on long-tailed lengths."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_post.data.packing import _place, pack_units


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing in its textbook form, one unit at a time. Returns the lengths in each pack."""
    rooms: list[int] = []
    packs: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, pack) for pack, room in enumerate(rooms) if room >= length]
        if fitting:
            _, pack = min(fitting)
        else:
            pack = len(packs)
            rooms.append(capacity)
            packs.append([])
        rooms[pack] -= length
        packs[pack].append(length)
    return packs


def as_lists(packs: list[np.ndarray], lengths: list[int]) -> list[list[int]]:
    return [[lengths[unit] for unit in pack] for pack in packs]


lengths_and_capacity = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=80), st.just(capacity))
)


@given(lengths_and_capacity)
def test_loses_and_doubles_nothing_and_never_overfills(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs = pack_units(np.array(lengths, dtype=np.int64), capacity=capacity)
    assert sorted(unit for pack in packs for unit in pack.tolist()) == list(range(len(lengths)))
    assert all(0 < sum(pack) <= capacity for pack in as_lists(packs, lengths))


@given(lengths_and_capacity)
def test_no_more_packs_than_the_textbook_form(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs = pack_units(np.array(lengths, dtype=np.int64), capacity=capacity)
    assert len(packs) <= len(best_fit_decreasing(lengths, capacity))


@given(lengths_and_capacity)
def test_best_fit_alone_is_the_textbook_form(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs, counts, num_packs = _place(np.array(lengths, dtype=np.int64), capacity, apart=0)
    totals = np.zeros(num_packs, dtype=np.int64)
    np.add.at(totals, np.repeat(packs, counts).astype(np.int64), np.sort(lengths)[::-1])
    # packs with equal room are interchangeable, so the comparison is of how full they are
    assert sorted(totals.tolist()) == sorted(map(sum, best_fit_decreasing(lengths, capacity)))


def test_the_longest_units_stand_apart() -> None:
    """Units of 6, 4 and thirty times 1 are packed into packs of 10.

    Best-fit alone joins 6 and 4 (36 + 16 = 52 in squares) and fills three packs with 1s. Forty tokens fill
    four packs, so the two longest units open a pack each, and 1s fill these packs.
    """
    lengths = [1] * 30 + [6, 4]
    assert best_fit_decreasing(lengths, 10)[0] == [6, 4]
    packs = pack_units(np.array(lengths), capacity=10)
    assert as_lists(packs, lengths) == [[6, 1, 1, 1, 1], [4, 1, 1, 1, 1, 1, 1], [1] * 10, [1] * 10]


def test_by_hand() -> None:
    # 23 tokens fill two packs, so one pack is opened by the longest unit, 7, as without the rule. 3 tokens
    # are left in it. Then 5 opens pack 1, 5 fills pack 1, 3 fills pack 0, 2 opens pack 2, and 1 joins it.
    lengths = [5, 1, 7, 3, 5, 2]
    packs = pack_units(np.array(lengths), capacity=10)
    assert [pack.tolist() for pack in packs] == [[2, 3], [0, 4], [5, 1]]


def test_deterministic() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 5000)
    first, second = (pack_units(lengths, capacity=256) for _ in range(2))
    assert [pack.tolist() for pack in first] == [pack.tolist() for pack in second]


def test_nothing_to_pack() -> None:
    assert len(pack_units(np.zeros(0, dtype=np.int64), capacity=8)) == 0


@pytest.mark.parametrize("lengths", [[3, 9], [0, 3], [-1]])
def test_lengths_that_cannot_be_packed(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit packs of 8"):
        pack_units(np.array(lengths), capacity=8)


def test_a_million_long_tailed_lengths_at_128k() -> None:
    """It takes 0.2 s on one 2.5 GHz core. `make bench` limits it to 2 s. Here a busy machine gets more."""
    normal = np.random.default_rng(0).normal(np.log(850) - 1.5**2 / 2, 1.5, 1_000_000)
    lengths = np.clip(np.exp(normal), 1, 131072).astype(np.int64)
    assert 800 < lengths.mean() < 900
    assert lengths.max() == 131072
    start = time.process_time()
    packs = pack_units(lengths, capacity=131072)
    assert time.process_time() - start < 8
    assert lengths.sum() / (len(packs) * 131072) >= 0.995
