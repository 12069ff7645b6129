"""Reads the columns of a store's index. A column is one file of plain values, which is mapped into memory.

Opening a store of ten million packs reads none of them. Ranks on one machine share the pages.
"""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_post.storage.checksums import crc32
from megatron_post.storage.reading import plain_file

# Values that share a checksum. A pack's segments are in one or two blocks of at most 32 KiB each.
BLOCK = 4096


class Column:
    """Values that are compared with their checksums, block by block, when they are first used.

    Any number of threads may use it.
    """

    def __init__(self, name: str, values: np.ndarray, checksums: np.ndarray | None = None) -> None:
        """checksums: uint32 [blocks], the CRC-32 of each block, or None if the values have been checked.

        Raises `ValueError` for another number of checksums than of blocks.
        """
        blocks = -(-len(values) // BLOCK)
        if checksums is not None and len(checksums) != blocks:
            raise ValueError(f"{name} has {blocks} blocks and {len(checksums)} checksums of blocks")
        self.values = values  # all of them, compared or not
        self._name = name
        self._checksums = checksums
        self._intact = bytearray(blocks)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Some rows, which must exist: those of a slice with both ends, or int64 [n].

        Raises `ValueError` if their block differs from its checksum.
        """
        if self._checksums is not None:
            if isinstance(rows, slice):
                blocks = range(rows.start // BLOCK, -(-rows.stop // BLOCK))
            else:
                blocks = np.unique(rows // BLOCK).tolist()
            for block in blocks:
                if not self._intact[block]:
                    self._check(block, int(self._checksums[block]))
        return self.values[rows]

    def _check(self, block: int, stated: int) -> None:
        if crc32(_block(self.values, block)) != stated:
            raise ValueError(f"{self._name} differs from its checksum in row {block * BLOCK} or after it")
        self._intact[block] = True


def block_checksums(values: np.ndarray) -> np.ndarray:
    """The CRC-32 of each block of a column, uint32 [blocks]."""
    blocks = range(-(-len(values) // BLOCK))
    return np.array([crc32(_block(values, block)) for block in blocks], dtype="<u4")


def mapped(array: Any, directory: Path, dtype: str) -> np.ndarray:
    """The values of a zarr array in `directory`, which has one chunk of plain bytes, as a view of its file.

    Raises `ValueError` if the array is stored in another way.
    """
    plain = not array.compressors and not array.filters and array.shards is None and array.dtype == dtype
    if not plain or array.chunks[0] < array.shape[0] or array.chunks[1:] != array.shape[1:]:
        raise ValueError(
            f"{array.path} is compressed, sharded or of another type or shape than `data pack` writes"
        )
    if not array.shape[0]:
        return np.zeros(array.shape, dtype)
    file = directory.joinpath("c", *("0" * array.ndim))
    return np.asarray(np.memmap(plain_file(file, "column"), dtype, mode="r", shape=array.shape))


def _block(values: np.ndarray, block: int) -> np.ndarray:
    return np.ascontiguousarray(values[block * BLOCK : (block + 1) * BLOCK]).view(np.uint8)
