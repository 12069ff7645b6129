"""Reading megatron-core's `torch_dist` checkpoints by rows, whatever layout of ranks has saved them.

The format is torch.distributed.checkpoint's: `.metadata` says of which rectangular chunks every tensor
consists and in which file, at which offset, each of them lies as a `torch.save`d archive of its own. So do
the objects that modules keep beside their tensors.
"""

import os
import zlib
from dataclasses import dataclass
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_post.convert.metadata_file import read_metadata
from megatron_post.convert.module_state import UnsafeState, safe_state
from megatron_post.convert.safetensors_file import OpenFiles, Stored, raw_bytes
from megatron_post.convert.source import BLOCK_BYTES, Kind
from megatron_post.convert.torch_file import BadTorchFile, load_plain, saved_tensors
from megatron_post.storage.manifest import DamagedCheckpoint


@dataclass
class _Chunk:
    """A rectangle of a tensor: where it begins, its sizes, and the archive that holds it.

    Known once it has been read from: where its values are, their checksum (None: not kept, or found right),
    and the checksum of the first `summed` bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    offset: int
    length: int
    stored: Stored | None = None
    crc32: int | None = None
    sum: int = 0
    summed: int = 0

    @property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.offsets, self.sizes


class DistCheckpoint:
    """The tensors of one checkpoint directory. Nothing is read before it is asked for."""

    def __init__(self, directory: Path, *, is_verified: bool = False) -> None:
        """is_verified: its files' checksums have just been compared, and its chunks are taken as they are: of
        the million and a half of a large run a rank then looks at its own alone. Its objects are looked at by
        `check_objects`.

        Raises `DamagedCheckpoint` where the metadata is not plain data or, unless it is verified, does not
        cover its tensors, and for an object that is not plain data.
        """
        self.directory, self._is_verified, self._files = directory, is_verified, OpenFiles()
        metadata = read_metadata(directory / ".metadata")
        entries = metadata.state_dict_metadata.items()
        self._entries = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self._storage: dict[MetadataIndex, object] = metadata.storage_data
        self._by_layer: dict[tuple[str, int | None], list[_Chunk]] = {}
        self.objects = metadata.state_dict_metadata.keys() - self._entries.keys()  # saved beside tensors
        if not is_verified:
            for key in self._entries:
                self._check_covered(key)
            self.check_objects()

    @property
    def kinds(self) -> dict[str, Kind]:
        """dtype and whole shape of every tensor; layers are stacked along the first dimension."""
        return {key: self._kind(key) for key in self._entries}

    def read_into(self, key: str, layer: int | None, row: int, out: Tensor) -> None:
        """Fill `out` with rows from `row` on of a tensor, or of one layer of a stacked one.

        Raises `DamagedCheckpoint` where a chunk's archive is not what the metadata says.
        """
        if self.read_rectangle(key, layer, (row, *(0 for _ in out.shape[1:])), out) != out.numel():
            raise DamagedCheckpoint(f"{self.directory}: the chunks of {key} do not cover it")

    def read_rectangle(self, key: str, layer: int | None, offsets: tuple[int, ...], out: Tensor) -> int:
        """Fill `out`, of any dtype on any device, with the rectangle that begins at `offsets` of a tensor, or
        of one layer of a stacked one. What lies outside of the tensor is left as it is.

        Returns the number of values that were filled. Raises `DamagedCheckpoint` as `read_into` does.
        """
        filled = 0
        for chunk in self._chunks(key, layer):
            first = chunk.offsets if layer is None else chunk.offsets[1:]
            sizes = chunk.sizes if layer is None else chunk.sizes[1:]
            low = [max(a, b) for a, b in zip(offsets, first, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, out.shape, first, sizes, strict=True)]
            if any(start >= end for start, end in zip(low, high, strict=True)):
                continue
            target, inside = out, [(a - b, c - a) for a, b, c in zip(low, first, high, strict=True)]
            for dim, (a, b, c) in enumerate(zip(low, offsets, high, strict=True)):
                target = target.narrow(dim, a - b, c - a)
            self._read_chunk(key, chunk, sizes, inside, target)
            filled += target.numel()
        return filled

    def check_begun(self) -> None:
        """Read chunks of which only the first rows were wanted to their end, so that these are checked too.

        Raises `DamagedCheckpoint` where one is damaged.
        """
        for (key, _), chunks in self._by_layer.items():
            for chunk in chunks:
                if chunk.crc32 is not None and chunk.summed:
                    self._check_rest(key, chunk)

    def check_objects(self, *, part: int = 0, parts: int = 1) -> None:
        """Read every `parts`-th of the objects. Raises `DamagedCheckpoint` as `read_object` does."""
        for key in sorted(self.objects)[part::parts]:
            self.read_object(key)

    def read_object(self, key: str) -> Any:
        """An object that a module keeps beside its tensors, fit to be given to a module: see `safe_state`.

        Raises `DamagedCheckpoint` where it asks for more than plain data, of which nothing is run.
        """
        path, offset, length = self._place(MetadataIndex(key))
        try:
            (value,) = load_plain(path, offset=offset, length=length)  # megatron-core saves a list of one
            return safe_state(value)
        except BadTorchFile as error:
            raise DamagedCheckpoint(f"{path}: {key}: {str(error).removeprefix(f'{path}: ')}") from error
        except (UnsafeState, TypeError, ValueError, RecursionError) as error:
            raise DamagedCheckpoint(
                f"{path}: {key}: not plain data; nothing in it was run: {error}"
            ) from error

    def _chunks(self, key: str, layer: int | None) -> list[_Chunk]:
        if (key, layer) not in self._by_layer:
            pieces = self._entries[key].chunks
            chunks = [self._chunk(key, c) for c in pieces if layer is None or c.offsets[0] == layer]
            for a, b in () if self._is_verified else combinations(chunks, 2):
                if all(max(i, j) < min(i + m, j + n) for i, m, j, n in zip(*a.place, *b.place, strict=True)):
                    raise DamagedCheckpoint(f"{self.directory}: .metadata: chunks of {key} overlap")
            self._by_layer[key, layer] = chunks
        return self._by_layer[key, layer]

    def _read_chunk(
        self,
        key: str,
        chunk: _Chunk,
        sizes: tuple[int, ...],
        inside: list[tuple[int, int]],
        target: Tensor,
    ) -> None:
        """sizes: of the chunk. inside: where `target` begins in it, and how far it goes, by dimension."""
        if chunk.stored is None:
            self._describe(key, chunk)
        assert chunk.stored is not None
        dtype, (row, rows) = self._kind(key).dtype, inside[0]
        whole = (rows, *sizes[1:])
        as_stored = target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous()
        block = target if as_stored and target.shape == whole else torch.empty(whole, dtype=dtype)
        place, data = row * prod(sizes[1:]) * dtype.itemsize, raw_bytes(block)
        self._files.read(chunk.path, chunk.stored.offset + place, data)
        if chunk.crc32 is not None:
            self._check(key, chunk, place, data)
        if block is not target:
            for dim, (start, size) in enumerate(inside[1:], start=1):
                block = block.narrow(dim, start, size)
            target.copy_(block)

    def _check(self, key: str, chunk: _Chunk, place: int, data: memoryview) -> None:
        """Checksum a chunk in passing where it is read from its beginning to its end, or else all at once."""
        assert chunk.stored is not None
        if place != chunk.summed:
            chunk.sum, chunk.summed = 0, 0
            self._check_rest(key, chunk)
            return
        chunk.sum, chunk.summed = zlib.crc32(data, chunk.sum), chunk.summed + len(data)
        if chunk.summed == chunk.stored.nbytes:
            self._check_rest(key, chunk)

    def _check_rest(self, key: str, chunk: _Chunk) -> None:
        """Sum what is left of a chunk and compare."""
        assert chunk.stored is not None
        buffer = memoryview(bytearray(min(BLOCK_BYTES, chunk.stored.nbytes - chunk.summed)))
        while chunk.summed < chunk.stored.nbytes:
            data = buffer[: chunk.stored.nbytes - chunk.summed]
            self._files.read(chunk.path, chunk.stored.offset + chunk.summed, data)
            chunk.sum, chunk.summed = zlib.crc32(data, chunk.sum), chunk.summed + len(data)
        if chunk.sum != chunk.crc32:
            raise DamagedCheckpoint(f"{chunk.path}: the chunk of {key} at {chunk.offsets} is damaged")
        chunk.crc32 = None

    def _describe(self, key: str, chunk: _Chunk) -> None:
        """Find where the chunk's values are, and compare its description with the metadata's."""
        saved = saved_tensors(chunk.path, offset=chunk.offset, length=chunk.length).get("")
        kind = self._kind(key)
        if saved is None or (saved.stored.dtype, saved.stored.shape) != (kind.dtype, chunk.sizes):
            raise DamagedCheckpoint(
                f"{chunk.path}: the chunk of {key} at {chunk.offsets} is not {chunk.sizes} {kind.dtype}"
            )
        chunk.stored, chunk.crc32 = saved.stored, None if self._is_verified else saved.crc32

    def _kind(self, key: str) -> Kind:
        entry = self._entries[key]
        return Kind(entry.properties.dtype, tuple(entry.size))

    def _check_covered(self, key: str) -> None:
        sizes = [self._chunk(key, piece).sizes for piece in self._entries[key].chunks]
        if sum(map(prod, sizes)) != prod(self._entries[key].size):
            raise DamagedCheckpoint(f"{self.directory}: .metadata: the chunks of {key} do not cover it")

    def _chunk(self, key: str, piece: ChunkStorageMetadata) -> _Chunk:
        offsets, sizes, shape = tuple(piece.offsets), tuple(piece.sizes), self._entries[key].size
        inside = len(offsets) == len(sizes) == len(shape) and all(
            0 <= int(o) <= int(o) + int(n) <= whole for o, n, whole in zip(offsets, sizes, shape, strict=True)
        )
        if not inside:
            raise DamagedCheckpoint(f"{self.directory}: .metadata: {key} has a chunk at {offsets} {sizes}")
        return _Chunk(offsets, sizes, *self._place(MetadataIndex(key, piece.offsets)))

    def _place(self, index: MetadataIndex) -> tuple[Path, int, int]:
        """File, offset and length of what an index names."""
        info = self._storage.get(index)
        if not isinstance(info, _StorageInfo):
            raise DamagedCheckpoint(f"{self.directory}: .metadata does not say where {index.fqn} lies")
        return self.directory / info.relative_path, int(info.offset), int(info.length)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is one published step."""
    return os.path.lexists(directory / ".metadata")
