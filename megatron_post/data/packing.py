"""Which unit goes in which pack: best-fit decreasing, in runs of equal lengths."""

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
    packs, counts, num_packs = _place(lengths, capacity)
    pack_of = np.repeat(np.array(packs, dtype=np.int64), np.array(counts, dtype=np.int64))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=num_packs))])
    return Packing(descending[np.argsort(pack_of, kind="stable")], offsets.astype(np.int64))


def _place(lengths: np.ndarray, capacity: int) -> tuple[list[int], list[int], int]:
    """Runs of units, longest first: the pack and the size of each; and the number of packs."""
    distinct, multiplicity = np.unique(lengths, return_counts=True)
    packs: list[int] = []
    counts: list[int] = []
    num_packs = 0
    rooms: list[int] = []  # the different amounts of room in open packs, ascending
    open_packs: dict[int, list[int]] = {}  # room -> the packs that have it
    for length, left in zip(distinct[::-1].tolist(), multiplicity[::-1].tolist(), strict=True):
        while left:
            position = bisect_left(rooms, length)
            if position < len(rooms):
                room = rooms[position]
                same_room = open_packs[room]
                pack = same_room.pop()
                if not same_room:
                    del open_packs[room]
                    del rooms[position]
            else:
                room, pack = capacity, num_packs
                num_packs += 1
            count = min(left, room // length)
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
