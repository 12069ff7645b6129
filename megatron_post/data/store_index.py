"""The index of a store's group: which segments each pack has, and what is known of each segment."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_post.data.store_checksums import StoreChecksums, array_digest
from megatron_post.data.store_columns import Column, mapped
from megatron_post.data.store_format import CHECKSUMS, COLUMNS, OFFSETS, PER_TOKEN
from megatron_post.data.store_metadata import damage


class StoreIndex:
    """Reads parts of columns as they are needed. `PackStore` makes it, within `damage`."""

    def __init__(self, path: Path, node: Any, checksums: StoreChecksums, pack_length: int) -> None:
        """`path` is the directory of the group, and `node` is its zarr group."""
        self._path = path
        self._node = node
        self._digests = checksums.arrays(path.name)
        self._blocks = checksums.blocks.get(path.name)
        self._pack_length = pack_length
        self._columns: dict[str, Column] = {}
        self._offsets = self._open(OFFSETS, "<i8")
        self._checksums = self._open(CHECKSUMS, "<u4")
        if len(self._checksums) != len(self):
            raise ValueError(
                f"{OFFSETS} has {len(self)} packs, the other arrays {{{CHECKSUMS!r}: {len(self._checksums)}}}"
            )
        first, self._num_segments = self._offsets[np.array([0, len(self)])].tolist()
        if first != 0:
            raise _impossible_offsets()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def segments(self, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first segment of each pack and the one after its last, int64 [n] each. packs: int64 [n].

        Raises `StoreError` for damage.
        """
        with damage(self._path):
            starts, ends = self._offsets[packs], self._offsets[packs + 1]
            counts = ends - starts
            possible = (starts >= 0) & (counts >= 1) & (counts <= self._pack_length)
            if not (possible & (ends <= self._num_segments)).all():
                raise _impossible_offsets()
        return starts, ends

    def rows(self, name: str, segments: slice | np.ndarray) -> np.ndarray:
        """Some rows of a per-segment column: a slice with both ends, or int64 [n].

        Raises `StoreError` if a block of them differs from its checksum.
        """
        with damage(self._path):
            return self._column(name)[segments]

    def column(self, name: str) -> np.ndarray:
        """A whole per-segment column, [segments]. Raises `StoreError` if it differs from its checksum."""
        with damage(self._path):
            return self._whole(f"segment/{name}", self._column(name).values)

    def checksum(self, pack: int, name: str) -> int:
        """CRC-32 of a pack's row in the per-token array `name`. Raises `StoreError` for damage."""
        with damage(self._path):
            return int(self._checksums[pack : pack + 1][0, list(PER_TOKEN).index(name)])

    def _column(self, name: str) -> Column:
        if name not in self._columns:
            column = self._open(f"segment/{name}", COLUMNS[name])
            if len(column) != self._num_segments:
                raise ValueError(f"segment/{name} has {len(column)} rows for {self._num_segments} segments")
            self._columns[name] = column
        return self._columns[name]

    def _open(self, name: str, dtype: str) -> Column:
        if name not in self._digests:
            # This must fail before zarr reads anything, since only the metadata of arrays with a checksum was
            # checked.
            raise ValueError(f"{name} has no checksum")
        if self._blocks is None:  # a store of an earlier version, whose columns are compressed
            return Column(name, self._whole(name, self._node[name][:]))
        stated = np.frombuffer(bytes.fromhex(self._blocks[name]), dtype="<u4")
        return Column(name, mapped(self._node[name], self._path / name, dtype), stated)

    def _whole(self, name: str, values: np.ndarray) -> np.ndarray:
        if array_digest(values) != self._digests[name]:
            raise ValueError(f"{name} differs from its checksum")
        return values


def _impossible_offsets() -> ValueError:
    return ValueError(f"{OFFSETS} does not start at 0 and grow by the segments of each pack")
