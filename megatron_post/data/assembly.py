"""Distributes units over packs and builds the arrays that the store writer needs."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_post.data.document_packs import DocumentAssembly, assemble_documents
from megatron_post.data.packing import pack_units
from megatron_post.data.permutation import permutation
from megatron_post.data.store_format import DOCUMENTS, GroupName, StoreSettings
from megatron_post.data.template import TokenRole
from megatron_post.data.units import Units, round_up


@dataclass(frozen=True)
class Assembly:
    """Packs of units. `assemble` makes it.

    used: int64 [n], the units in pack order, with repeats.
    segment_ends: int64 [packs + 1]. Pack i has the segments segment_ends[i]:segment_ends[i + 1] of `used`.
    """

    units: Units
    settings: StoreSettings
    used: np.ndarray
    segment_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.segment_ends) - 1

    def columns(self) -> dict[str, np.ndarray]:
        """The store's `COLUMNS`, each [segments] in pack order."""
        units, segments = self.units, self.units.segments_of(self.used)
        segments_of_unit = np.diff(units.unit_starts)[self.used]
        unit = np.repeat(self.used, segments_of_unit)
        return {
            "padded": round_up(units.segment_lengths, self.settings.segment_multiple)[segments],
            "length": units.segment_lengths[segments],
            "source": units.sources[unit],
            "sample": units.samples[unit],
            "unit": np.repeat(np.arange(len(self.used)), segments_of_unit),
            "rank": units.ranks[segments],
            "turns": units.turns[unit],
            "response": units.responses[segments],
        }

    def packs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and roles of each pack, [pack_length] each."""
        units, settings = self.units, self.settings
        segments = units.segments_of(self.used)
        for start, end in zip(self.segment_ends[:-1], self.segment_ends[1:], strict=True):
            tokens = np.full(settings.pack_length, settings.pad_id, dtype=np.int32)
            roles = np.full(settings.pack_length, TokenRole.PADDING, dtype=np.uint8)
            position = 0
            for segment in segments[start:end].tolist():
                segment_tokens, segment_roles = units.read(segment)
                length = len(segment_tokens)
                tokens[position : position + length] = segment_tokens
                roles[position : position + length] = segment_roles
                position += round_up(length, settings.segment_multiple)
            yield tokens, roles


def assemble(
    units: Units, used: np.ndarray, group: GroupName, settings: StoreSettings
) -> Assembly | DocumentAssembly:
    """Pack the units `used` (int64 [n], repeats allowed) and shuffle the packs with the seed."""
    # Best-fit keeps the input order of units of equal length. Without this shuffle, packs would hold the
    # units of one source side by side.
    used = used[permutation(len(used), settings.seed, group, "units")]
    if settings.layout in DOCUMENTS:
        return assemble_documents(units, used, group, settings)
    lengths = units.lengths(multiple=settings.segment_multiple)[used]
    packs = pack_units(lengths, capacity=settings.pack_length)
    packs = [packs[i] for i in permutation(len(packs), settings.seed, group, "packs")]
    used = used[np.concatenate([np.zeros(0, dtype=np.int64), *packs])]
    unit_ends = np.cumsum([0, *map(len, packs)])
    segment_ends = np.concatenate([[0], np.cumsum(np.diff(units.unit_starts)[used])])[unit_ends]
    return Assembly(units, settings, used, segment_ends)
