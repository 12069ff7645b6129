"""Converts a checkpoint of the trainer to a Hugging Face directory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from megatron_post.convert.configs import fingerprint_of, index_of
from megatron_post.convert.hf_directory import INDEX
from megatron_post.convert.jobs import Part
from megatron_post.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_post.convert.part_file import PartFile
from megatron_post.convert.safetensors_file import header_of, raw_bytes
from megatron_post.convert.shards import SHARD_BYTES, plan_shards, shard_name
from megatron_post.convert.source import BLOCK_BYTES, ModelSource, row_blocks
from megatron_post.storage import manifest


@dataclass(frozen=True)
class ToHuggingFace:
    """A `jobs.Job`. source: all checkpoints of a run, or the directory of one step.

    step: by default the newest.
    """

    source: str
    directory: str
    step: int | None = None
    max_shard_bytes: int = SHARD_BYTES

    @property
    def target(self) -> Path:
        return Path(self.directory).absolute()

    @property
    def partial(self) -> Path:
        return self.target.with_name(f".partial-{self.target.name}")

    @property
    def settings(self) -> dict[str, str | int | None]:
        return {
            "source": self._source.fingerprint,
            "config or tokenizer": fingerprint_of(self._companions),
            "shard size": self.max_shard_bytes,
        }

    @cached_property
    def parts(self) -> list[Part]:
        kinds = self._source.tensors
        return [
            Part(shard_name(i, len(self._shards)), sum(kinds[name].nbytes for name in names))
            for i, names in enumerate(self._shards)
        ]

    def write_part(self, number: int, file: PartFile) -> dict[str, Any]:
        kinds = {name: self._source.tensors[name] for name in self._shards[number]}
        header, places = header_of({name: (kind.dtype, kind.shape) for name, kind in kinds.items()})
        file.write(header)
        size = max(BLOCK_BYTES, max(kind.row_bytes for kind in kinds.values()))
        buffers = cycle(torch.empty(2, size, dtype=torch.uint8))  # tensors are aligned, bytearrays are not
        for name in places:
            kind = kinds[name]
            for start, end in row_blocks(kind):
                data = next(buffers)[: (end - start) * kind.row_bytes]
                self._source.read_into(name, start, data.view(kind.dtype).view(end - start, *kind.shape[1:]))
                file.write(raw_bytes(data))
        for source in self._read_from:
            if isinstance(source, MegatronCheckpoint):
                source.checkpoint.finish_checksums()
        return {}

    def publish(self, records: list[dict[str, Any]]) -> None:
        files = self._source.documents() | self._companions
        if len(self.parts) > 1:
            weight_map = {
                name: part.name
                for part, names in zip(self.parts, self._shards, strict=True)
                for name in names
            }
            files[INDEX] = index_of(weight_map, self._source.tensors)
        for name, content in files.items():
            with (self.partial / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self.partial.rename(self.target)
        manifest.sync_directory(self.target.parent)

    @cached_property
    def _source(self) -> ModelSource:
        return MegatronCheckpoint(self.source, step=self.step)

    @property
    def _read_from(self) -> Sequence[ModelSource]:
        """The models on disk whose tensors are read."""
        return [self._source]

    @cached_property
    def _companions(self) -> dict[str, bytes]:
        return self._source.companions()

    @cached_property
    def _shards(self) -> list[list[str]]:
        return plan_shards(self._source.tensors, max_bytes=self.max_shard_bytes)
