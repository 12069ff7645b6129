"""Assigns units to packs by best-fit decreasing, and keeps the longest units in different packs."""

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np


def pack_units(lengths: np.ndarray, *, capacity: int) -> list[np.ndarray]:
    """Put units in as few packs of `capacity` tokens as best-fit can.

    Returns the units of each pack, int64 [units of the pack], the longest first. Every unit is in one pack.

    lengths: int [n], tokens of each unit with padding. A unit must stay in one pack. It is a dialog, or all
    responses of a preference.

    Best-fit decreasing (Johnson, 1974) starts with the longest unit and puts each unit in the fullest pack
    that still has room for it. After that, the same pack is also the fullest one with room for the next unit
    of the same length, until it is full. So units of equal length are placed in runs of `room // length`,
    with one search per run instead of one per unit.

    All packs have the same number of tokens, so their times differ by attention, whose cost grows with the
    square of the lengths. Best-fit would join the longest units (70 and 61 in a pack of 131). To keep them
    apart, each of the longest units opens a pack of its own, for half of the packs that the tokens would
    fill. If that needs more packs in total than plain best-fit, plain best-fit is used.

    The result is deterministic, because units of equal length keep their input order. Raises `ValueError` for
    a length that is not positive or exceeds the capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and not 0 < lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"units of {lengths.min()} to {lengths.max()} tokens do not fit packs of {capacity}; "
            "raise data.pack_length or set data.overlong"
        )
    descending = np.argsort(-lengths, kind="stable")
    apart = int(lengths.sum()) // (2 * capacity)
    # If both need the same number of packs, `min` takes the first, which keeps the longest units apart.
    packs, counts, num_packs = min(
        (_place(lengths, capacity, apart=apart), _place(lengths, capacity, apart=0)), key=lambda p: p[2]
    )
    pack_of = np.repeat(np.array(packs, dtype=np.int64), np.array(counts, dtype=np.int64))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=num_packs))])
    units = descending[np.argsort(pack_of, kind="stable")]
    return [units[start:end] for start, end in pairwise(offsets.tolist())]


def _place(lengths: np.ndarray, capacity: int, *, apart: int) -> tuple[list[int], list[int], int]:
    """The pack and the size of each run of units, the longest first, and the number of packs.

    Each of the first `apart` units opens a pack of its own.
    """
    distinct, multiplicity = np.unique(lengths, return_counts=True)
    packs: list[int] = []
    counts: list[int] = []
    num_packs = 0
    rooms: list[int] = []  # the distinct amounts of free tokens in open packs, ascending
    open_packs: dict[int, list[int]] = {}  # room -> the packs that have it
    for length, left in zip(distinct[::-1].tolist(), multiplicity[::-1].tolist(), strict=True):
        while left:
            position = bisect_left(rooms, length)
            alone = num_packs < apart
            if alone or position == len(rooms):
                room, pack = capacity, num_packs
                num_packs += 1
            else:
                room = rooms[position]
                same_room = open_packs[room]
                pack = same_room.pop()
                if not same_room:
                    del open_packs[room]
                    del rooms[position]
            count = 1 if alone else min(left, room // length)
            packs.append(pack)
            counts.append(count)
            left -= count
            room -= count * length
            if room in open_packs:
                open_packs[room].append(pack)
            elif room:
                open_packs[room] = [pack]
                insort(rooms, room)
    return packs, counts, num_packs
