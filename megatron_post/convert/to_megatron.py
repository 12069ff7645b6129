"""Converts Hugging Face or Meta weights to a checkpoint that the trainer can load in any layout."""

import io
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_post.convert.configs import fingerprint_of, with_dtype
from megatron_post.convert.jobs import ConversionError, Part
from megatron_post.convert.mapping import CoreTensor, core_tensors, row_ranges
from megatron_post.convert.open_model import open_weights_directory
from megatron_post.convert.part_file import PartFile
from megatron_post.convert.safetensors_file import raw_bytes
from megatron_post.convert.source import BLOCK_BYTES, DTYPE_NAMES, Kind, ModelSource, read_rows, row_blocks
from megatron_post.convert.torch_archive import ArchiveFile
from megatron_post.storage import manifest

PART_BYTES = 2 * 1024**3
# Ranks read whole chunks and cut their slices out of them, so chunks must be small.
CHUNK_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class _Chunk:
    """Rows [start, end) of a parameter."""

    core: CoreTensor
    start: int
    end: int
    kind: Kind


@dataclass(frozen=True)
class ToMegatron:
    """A `jobs.Job`. source: a directory of weights. root: a run's checkpoints, where this becomes step 0.

    dtype: "bf16", "fp16" or "fp32", or None to keep the source's.
    """

    source: str
    root: str
    dtype: str | None = None
    part_bytes: int = PART_BYTES
    chunk_bytes: int = CHUNK_BYTES

    @property
    def target(self) -> Path:
        return manifest.step_directory(Path(self.root), 0)

    @property
    def partial(self) -> Path:
        return manifest.partial_directory(Path(self.root), 0)

    @property
    def settings(self) -> dict[str, str | int | None]:
        return {
            "source": self._source.fingerprint,
            "config or tokenizer": fingerprint_of(self._companions),
            "dtype": self.dtype,
            "part size": self.part_bytes,
            "chunk size": self.chunk_bytes,
        }

    @cached_property
    def parts(self) -> list[Part]:
        return [
            Part(f"__{i}_0.distcp", sum(chunk.kind.nbytes for chunk in chunks))
            for i, chunks in enumerate(self._chunks)
        ]

    def check(self) -> None:
        """Raises `ConversionError` if the run has later checkpoints, from which it would resume."""
        steps = manifest.published_steps(Path(self.root))
        if steps and steps != [0]:
            raise ConversionError(
                f"{self.root} has checkpoints of steps {', '.join(map(str, steps))}, and the run resumes "
                "from the newest; choose the `checkpoints` directory of a new run"
            )

    def write_part(self, number: int, file: PartFile) -> dict[str, Any]:
        archives, places = ArchiveFile(file), []
        for chunk in self._chunks[number]:
            begin = archives.position
            archives.append(chunk.kind, self._blocks(chunk))
            offsets = chunk.core.at(chunk.start)
            places.append([chunk.core.key, offsets, chunk.kind.shape, begin, archives.position - begin])
        return {"chunks": places, "crc32": archives.crc32}

    def publish(self, records: list[dict[str, Any]]) -> None:
        files: dict[str, Any] = {
            part.name: {"bytes": record["bytes"], "crc32": record["crc32"]}
            for part, record in zip(self.parts, records, strict=True)
        }
        # megatron-core keeps state that is not sharded in this file. Converted weights have none.
        common = io.BytesIO()
        torch.save({}, common)
        small = (
            self._source.documents()
            | self._companions
            | {
                ".metadata": pickle.dumps(self._metadata(records)),
                "metadata.json": json.dumps(_BACKENDS).encode(),
                "common.pt": common.getvalue(),
            }
        )
        for name, content in small.items():
            (self.partial / name).write_bytes(content)
        files |= manifest.checksums(self.partial, sorted(small))
        state = {"weights_only": True, **self._head}
        manifest.publish(Path(self.root), 0, files=files, state=state, keep=1)

    @cached_property
    def _source(self) -> ModelSource:
        return open_weights_directory(Path(self.source))

    @property
    def _head(self) -> dict[str, bool]:
        """The kind of the model's head, as the manifest records it."""
        return {"scalar_head": self._source.scalar_head, "scores_steps": self._source.scores_steps}

    @cached_property
    def _companions(self) -> dict[str, bytes]:
        companions = self._source.companions()
        return companions if self.dtype is None else with_dtype(companions, DTYPE_NAMES[self.dtype])

    @cached_property
    def _chunks(self) -> list[list[_Chunk]]:
        """The chunks of each part, in the order of the model's layers."""
        parts: list[list[_Chunk]] = [[]]
        held = 0
        for chunk in self._all_chunks():
            if held and held + chunk.kind.nbytes > self.part_bytes:
                parts.append([])
                held = 0
            parts[-1].append(chunk)
            held += chunk.kind.nbytes
        return parts

    def _all_chunks(self) -> Iterator[_Chunk]:
        dtypes: dict[str, torch.dtype] = {}
        for core in core_tensors(self._source.model, **self._head):
            for name in core.hf:
                own = DTYPE_NAMES[self.dtype] if self.dtype else self._source.tensors[name].dtype
                if dtypes.setdefault(core.key, own) != own:
                    raise ConversionError(
                        f"{self.source}: {name} is {own}, but the same tensor of another layer is "
                        f"{dtypes[core.key]}; megatron-core stacks layers in one tensor, so choose one dtype "
                        "with --dtype"
                    )
            dtype, stack = dtypes[core.key], () if core.layer is None else (1,)
            for start, end in row_blocks(Kind(dtype, core.shape), block_bytes=self.chunk_bytes):
                yield _Chunk(core, start, end, Kind(dtype, (*stack, end - start, *core.shape[1:])))

    def _blocks(self, chunk: _Chunk) -> Iterator[memoryview]:
        """The chunk's bytes, block by block, in two buffers that are used in turn."""
        shape, dtype = chunk.core.shape[1:], chunk.kind.dtype
        size = max(BLOCK_BYTES // dtype.itemsize, prod(shape))
        buffers = cycle(torch.empty(2, size, dtype=dtype))
        for run in row_ranges(chunk.core, self._source.model):
            first, last = max(chunk.start, run.core_row), min(chunk.end, run.core_row + run.rows)
            rows = Kind(dtype, (max(0, last - first), *shape))
            for start, end in row_blocks(rows):
                block = next(buffers)[: (end - start) * prod(shape)].view(end - start, *shape)
                self._read(run.name, run.hf_row + first - run.core_row + start, block)
                yield raw_bytes(block)

    def _read(self, name: str, row: int, block: Tensor) -> None:
        if self._source.tensors[name].dtype == block.dtype:
            self._source.read_into(name, row, block)
        else:
            block.copy_(read_rows(self._source, name, row, row + len(block)))

    def _metadata(self, records: list[dict[str, Any]]) -> Metadata:
        """The index that torch.distributed.checkpoint reads first: the file and offset of every chunk."""
        cores = {c.key: c for c in core_tensors(self._source.model, **self._head)}
        dtypes = {chunk.core.key: chunk.kind.dtype for chunks in self._chunks for chunk in chunks}
        tensors = {
            key: TensorStorageMetadata(TensorProperties(dtype=dtypes[key]), torch.Size(core.stored_shape), [])
            for key, core in cores.items()
        }
        storage = {}
        for part, record in zip(self.parts, records, strict=True):
            for key, offsets, sizes, begin, length in record["chunks"]:
                place = torch.Size(offsets)
                index = MetadataIndex(key, place, len(tensors[key].chunks))
                tensors[key].chunks.append(ChunkStorageMetadata(place, torch.Size(sizes)))
                storage[index] = _StorageInfo(part.name, begin, length)
        return Metadata(dict(tensors), storage_data=storage, storage_meta=StorageMeta())


# megatron-core reads these to choose how it reads the rest.
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
