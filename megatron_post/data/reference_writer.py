"""Writes reference log-probabilities into a store from any number of ranks.

The array has a temporary name until all rows are written, so that a reader never sees a part of it.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from megatron_post.data.store import PackStore
from megatron_post.data.store_checksums import array_digest
from megatron_post.data.store_format import CHECKSUMS, REFERENCE
from megatron_post.storage.checksums import crc32


class ReferenceWriter:
    """Writes the array `reference_logps` of one group. `publish` renames it to its final name."""

    def __init__(self, store: PackStore) -> None:
        self._store = store
        self._group = store.path / store.group
        self._partial = f".{REFERENCE}.partial"
        self._in_chunk = store.packs_in_chunk("tokens")

    def create(self, key: str, roles: Sequence[str]) -> None:
        """Create the files for all packs. One rank calls this, before any rank writes a row.

        roles: names of the token roles whose log-probabilities will be written. Other tokens get 0.
        """
        shutil.rmtree(self._group / self._partial, ignore_errors=True)
        node: Any = zarr.open_group(self._store.path, mode="r+", path=self._store.group)
        length = self._store.settings.pack_length
        array = node.create_array(
            self._partial,
            shape=(len(self._store), length),
            chunks=(self._in_chunk, length),
            dtype="<f4",
            compressors=None,
            dimension_names=("pack", "token"),
            attributes={"key": key, "trained_roles": list(roles)},
        )
        # Create the chunk files in full size, so that no rank has to create or extend a file that others
        # write.
        for chunk in range(-(-len(self._store) // self._in_chunk)):
            path = self._chunk(chunk)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(self._in_chunk * length * array.dtype.itemsize)
        np.zeros(len(self._store), dtype="<u4").tofile(self._group / self._partial / CHECKSUMS)

    def write(self, pack: int, logps: np.ndarray) -> None:
        """Write one pack's row, float32 [pack_length]. Ranks may write to the same file at the same time."""
        chunk, row = divmod(pack, self._in_chunk)
        content = np.ascontiguousarray(logps, dtype="<f4").tobytes()
        _write_at(self._chunk(chunk), content, row * len(content))
        checksum = np.array(crc32(content), dtype="<u4").tobytes()
        _write_at(self._group / self._partial / CHECKSUMS, checksum, pack * len(checksum))

    def publish(self) -> None:
        """Rename the array to its final name. One rank calls this after all rows are written."""
        checksums = np.fromfile(self._group / self._partial / CHECKSUMS, dtype="<u4")
        node: Any = zarr.open_group(self._store.path, mode="r+", path=self._store.group)
        # The checksum is written before the rename, so that a visible array always has one.
        node[self._partial].attrs[CHECKSUMS] = array_digest(checksums)
        final = self._group / REFERENCE
        shutil.rmtree(final, ignore_errors=True)
        (self._group / self._partial).rename(final)

    def _chunk(self, number: int) -> Path:
        return self._group / self._partial / "c" / str(number) / "0"


def _write_at(path: Path, content: bytes, offset: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content, offset)
    finally:
        os.close(descriptor)
