"""Which unit goes in which pack: best-fit decreasing, in runs of equal lengths, the longest units apart."""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Units grouped by pack: pack i holds `units[offsets[i]:offsets[i + 1]]`, longest first.

    units: int64 [n], every unit once; offsets: int64 [packs + 1].
    """

    units: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        return self.units[self.offsets[pack] : self.offsets[pack + 1]]


def pack_units(lengths: np.ndarray, *, capacity: int) -> Packing:
    """Put units of `lengths` (int [n], tokens, padding included) in as few packs of `capacity` tokens as
    best-fit can.

    A unit is what must stay in one pack: a dialog, or all responses of a pair. Best-fit decreasing (Johnson,
    1974) takes the units from the longest and puts each in the fullest pack that still has room. When a unit
    has found its pack, that pack stays the fullest one with room for the next unit of the same length as long
    as it has room at all; so equal lengths go in runs of `room // length`, and the cost is one search a run
    instead of one a unit.

    All packs have equally many tokens, so what makes one take longer than another is attention, the square of
    its units. Best-fit would join the longest units of all (70 and 61 in a pack of 131). They are kept apart:
    half of as many packs as the tokens fill are opened by the longest units, one each, unless that needs more
    packs than best-fit alone.

    Deterministic: equal lengths keep the order of the input. Raises `ValueError` for a length that is not
    positive or exceeds the capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and not 0 < lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"units of {lengths.min()} to {lengths.max()} tokens do not fit packs of {capacity}; "
            "raise data.pack_length or set data.overlong"
        )
    descending = np.argsort(-lengths, kind="stable")
    apart = int(lengths.sum()) // (2 * capacity)
    # of two equally good ones `min` takes the first
    packs, counts, num_packs = min(
        (_place(lengths, capacity, apart=apart), _place(lengths, capacity, apart=0)), key=lambda p: p[2]
    )
    pack_of = np.repeat(np.array(packs, dtype=np.int64), np.array(counts, dtype=np.int64))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=num_packs))])
    return Packing(descending[np.argsort(pack_of, kind="stable")], offsets.astype(np.int64))


def _place(lengths: np.ndarray, capacity: int, *, apart: int) -> tuple[list[int], list[int], int]:
    """Runs of units, longest first: the pack and the size of each; and the number of packs. The first `apart`
    units each open a pack."""
    distinct, multiplicity = np.unique(lengths, return_counts=True)
    packs: list[int] = []
    counts: list[int] = []
    num_packs = 0
    rooms: list[int] = []  # the different amounts of room in open packs, ascending
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
