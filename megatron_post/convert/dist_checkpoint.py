"""Reads megatron-core's `torch_dist` checkpoints by rows, whatever layout of ranks saved them.

The format is the one of torch.distributed.checkpoint. The file `.metadata` lists the rectangular chunks of
every tensor, with the file and the offset of each chunk. Each chunk is an archive of its own, as `torch.save`
writes it. The objects that modules save beside their tensors are stored in the same way.
"""

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
from megatron_post.storage.checksums import crc32
from megatron_post.storage.manifest import DamagedCheckpoint


@dataclass
class _Chunk:
    """A rectangle of a tensor: where it begins, its sizes, and the archive that holds it.

    stored: the place of the values, None until the chunk is first read. crc32: the checksum of the values, or
    None if the archive has none or if it has been compared. sum: the checksum of the first `summed` bytes.
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
    """The tensors of one checkpoint directory. Each value is read when it is requested, and not before."""

    def __init__(self, directory: Path, *, is_verified: bool = False) -> None:
        """Opens a checkpoint directory.

        is_verified: the checksums of the files have just been compared. The chunks are then not checked
        again, because a large run has 1.5 million of them and each rank needs only its own. `check_objects`
        still checks the objects.

        Raises `DamagedCheckpoint` if the metadata is not plain data. If `is_verified` is false, raises it
        also if the chunks do not cover their tensors, or if an object is not plain data.
        """
        self.directory, self._is_verified, self._files = directory, is_verified, OpenFiles()
        metadata = read_metadata(directory / ".metadata")
        entries = metadata.state_dict_metadata.items()
        self._entries = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self._storage: dict[MetadataIndex, object] = metadata.storage_data
        self._by_layer: dict[tuple[str, int | None], list[_Chunk]] = {}
        # saved by modules beside their tensors
        self.objects = metadata.state_dict_metadata.keys() - self._entries.keys()
        if not is_verified:
            for key in self._entries:
                self._check_covered(key)
            self.check_objects()

    @property
    def kinds(self) -> dict[str, Kind]:
        """dtype and full shape of every tensor. Layers are stacked along the first dimension."""
        return {key: self._kind(key) for key in self._entries}

    def read_into(self, key: str, layer: int | None, row: int, out: Tensor) -> None:
        """Fill `out` with rows of a tensor from `row` on, or of one layer of a stacked tensor.

        Raises `DamagedCheckpoint` if a chunk's archive does not match the metadata.
        """
        if self.read_rectangle(key, layer, (row, *(0 for _ in out.shape[1:])), out) != out.numel():
            raise DamagedCheckpoint(f"{self.directory}: the chunks of {key} do not cover it")

    def read_rectangle(self, key: str, layer: int | None, offsets: tuple[int, ...], out: Tensor) -> int:
        """Fill `out` with the rectangle that begins at `offsets` in a tensor or one layer of a stack.

        `out` may have any dtype and device. Its values that lie outside the tensor stay as they are. Returns
        the number of values that were filled. Raises `DamagedCheckpoint` as `read_into` does.
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

    def finish_checksums(self) -> None:
        """Read the chunks that were read in part to their end, so that their checksums can be compared.

        Raises `DamagedCheckpoint` if a chunk is damaged.
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
        """An object that a module saved beside its tensors, made safe by `safe_state`.

        Raises `DamagedCheckpoint` if the pickle refers to more than plain data. Nothing in it is run.
        """
        path, offset, length = self._place(MetadataIndex(key))
        try:
            # megatron-core wraps each object in a list
            (value,) = load_plain(path, offset=offset, length=length)
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
            # The sizes alone do not find overlaps. If two chunks hold the same rows, the sizes can add up to
            # the tensor's size while other rows are in no chunk.
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
        """Fill `target` from one chunk.

        sizes: of the chunk. inside: where `target` begins in the chunk and its size, for each dimension.
        """
        if chunk.stored is None:
            self._locate_values(key, chunk)
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
        """Update the checksum of a chunk with `data`, and compare it at the end.

        A chunk that is not read in order is checksummed at once.
        """
        assert chunk.stored is not None
        if place != chunk.summed:
            chunk.sum, chunk.summed = 0, 0
            self._check_rest(key, chunk)
            return
        chunk.sum, chunk.summed = crc32(data, chunk.sum), chunk.summed + len(data)
        if chunk.summed == chunk.stored.nbytes:
            self._check_rest(key, chunk)

    def _check_rest(self, key: str, chunk: _Chunk) -> None:
        """Read the rest of a chunk, and compare its checksum."""
        assert chunk.stored is not None
        buffer = memoryview(bytearray(min(BLOCK_BYTES, chunk.stored.nbytes - chunk.summed)))
        while chunk.summed < chunk.stored.nbytes:
            data = buffer[: chunk.stored.nbytes - chunk.summed]
            self._files.read(chunk.path, chunk.stored.offset + chunk.summed, data)
            chunk.sum, chunk.summed = crc32(data, chunk.sum), chunk.summed + len(data)
        if chunk.sum != chunk.crc32:
            raise DamagedCheckpoint(f"{chunk.path}: the chunk of {key} at {chunk.offsets} is damaged")
        chunk.crc32 = None

    def _locate_values(self, key: str, chunk: _Chunk) -> None:
        """Find the chunk's values in its archive, and compare their dtype and shape with the metadata."""
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
        """File, offset and length of the archive that an index names."""
        info = self._storage.get(index)
        if not isinstance(info, _StorageInfo):
            raise DamagedCheckpoint(f"{self.directory}: .metadata does not say where {index.fqn} lies")
        return self.directory / info.relative_path, int(info.offset), int(info.length)
