"""Writes checkpoints while training goes on.

A save begins by copying the rank's shards to the host. Only the optimizer's step changes the live tensors, so
the copy runs beside the next forward and backward pass. `wait_for_copy` returns when it is complete. Each
rank then writes its shards to its own file, and a note that lists them. The first rank waits for all notes,
writes the metadata that torch.distributed.checkpoint reads, and publishes the checkpoint if no newer
incarnation exists.

The ranks communicate by files in the partial directory. A collective from the writer's thread would
interleave with the collectives of training in another order on each rank.

Two libraries were compared. The `async_save` of torch 2.13's torch.distributed.checkpoint needs a gloo group
beside NCCL for the collectives of its own thread, and its files have no checksums. megatron-core 0.16.1
writes in forked processes, and all ranks find out by a collective whether a save is complete.
"""

import contextlib
import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch
from blake3 import blake3
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_post.convert.metadata_file import collector_paused
from megatron_post.convert.safetensors_file import raw_bytes
from megatron_post.convert.source import Kind
from megatron_post.convert.torch_archive import ArchiveFile, blocks_of
from megatron_post.train.shards import Shard


class SaveFailed(ValueError):
    """A checkpoint could not be written. Earlier checkpoints are unchanged."""


@dataclass(frozen=True)
class Save:
    """What one rank contributes to a checkpoint.

    partial: the directory to write into. objects: serialized objects by key, which go into the rank's file.
    small: contents of further files by name. publish: set on the first rank only. It is called with `files`,
    the manifest's entries of all files, once everything is on the disk.
    """

    partial: Path
    shards: Sequence[Shard]
    objects: dict[str, bytes]
    small: dict[str, bytes]
    publish: Callable[..., object] | None = None


@dataclass
class Saver:
    """One rank's writer. It writes one save at a time, in a thread, and reuses its buffers on the host.

    stalled: seconds that training has waited for saves so far.
    """

    rank: int
    world_size: int
    device: torch.device
    stalled: float = 0.0
    error: Exception | None = None
    _buffers: list[Tensor] = field(default_factory=list)
    _thread: threading.Thread | None = None
    _copied: threading.Event = field(default_factory=threading.Event)

    def start(self, save: Save, *, asynchronous: bool) -> None:
        """Begin a save, after the previous one is complete. If not asynchronous, return when it is written.

        An error is stored in `error` and not raised, because the other ranks do not know of it yet.
        """
        self.wait()
        began = time.perf_counter()
        if asynchronous:
            self._copied.clear()
            ready = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
            # A daemon thread does not keep the process alive. A rank that fails for another reason must exit
            # although the first rank's thread still waits for notes that never come.
            self._thread = threading.Thread(target=self._copy_and_write, args=(save, ready), daemon=True)
            self._thread.start()
        else:
            self._write(save, (shard.values.to("cpu", shard.dtype, copy=True) for shard in save.shards))
        self.stalled += time.perf_counter() - began

    def wait_for_copy(self) -> None:
        """Return once the live tensors have been copied, so that they may change."""
        if self._thread is not None and not self._copied.is_set():
            began = time.perf_counter()
            self._copied.wait()
            self.stalled += time.perf_counter() - began

    def wait(self) -> None:
        """Return once this rank's part of the save is written. On the first rank it is then published."""
        if self._thread is not None:
            began = time.perf_counter()
            self._thread.join()
            self._thread = None
            self.stalled += time.perf_counter() - began

    def _copy_and_write(self, save: Save, ready: Any) -> None:
        try:
            self._copy(save.shards, ready)
        except Exception as error:
            self._fail(save, error)
            return
        finally:
            self._copied.set()
        self._write(save, self._buffers)

    def _copy(self, shards: Sequence[Shard], ready: Any) -> None:
        on_gpu = ready is not None
        if not self._buffers:
            self._buffers = [
                torch.empty(shard.values.shape, dtype=shard.dtype, pin_memory=on_gpu) for shard in shards
            ]
        if not on_gpu:
            for buffer, shard in zip(self._buffers, shards, strict=True):
                buffer.copy_(shard.values)
            return
        torch.cuda.set_device(self.device)
        stream = torch.cuda.Stream()
        stream.wait_event(ready)  # the training stream may not have computed the values yet
        with torch.cuda.stream(stream):
            for buffer, shard in zip(self._buffers, shards, strict=True):
                buffer.copy_(shard.values, non_blocking=True)
        stream.synchronize()

    def _write(self, save: Save, values: Any) -> None:
        """Write this rank's part and leave a note. The first rank collects all notes and publishes."""
        try:
            save.partial.mkdir(parents=True, exist_ok=True)
            note = _write_files(save, values, name=f"__{self.rank}_0.distcp")
            if save.publish is None:
                _leave_note(save.partial, self.rank, note)
                return
            notes = [note, *(self._note_of(save.partial, rank) for rank in range(1, self.world_size))]
            files = {name: entry for each in notes for name, entry in each["files"].items()}
            with collector_paused():
                metadata = pickle.dumps(_metadata(notes))
            files[".metadata"] = _write_file(save.partial / ".metadata", metadata)
            for path in save.partial.glob(".note-*"):
                path.unlink()
            save.publish(files=files)
        except Exception as error:
            self._fail(save, error)

    def _fail(self, save: Save, error: Exception) -> None:
        """Store the error, and leave a mark for the first rank, which waits for this rank's note.

        If the first rank fails, it removes the files of all ranks, since no other rank publishes them.
        """
        self.error = error
        if save.publish is not None:
            shutil.rmtree(save.partial, ignore_errors=True)
            return
        with contextlib.suppress(OSError):
            save.partial.mkdir(parents=True, exist_ok=True)
            (save.partial / f".failed-{self.rank}").touch()

    def _note_of(self, partial: Path, rank: int) -> dict[str, Any]:
        """Wait for a rank's note. Raises `SaveFailed` if the rank has failed or the directory is gone."""
        path = _note(partial, rank)
        while not path.exists():
            if (partial / f".failed-{rank}").exists():
                raise SaveFailed(f"rank {rank} could not write its part")
            if not partial.exists():
                raise SaveFailed(
                    f"{partial} was removed while rank 0 waited for rank {rank} to write into it"
                )
            time.sleep(0.02)
        note: dict[str, Any] = json.loads(path.read_text())
        return note


def _note(partial: Path, rank: int) -> Path:
    return partial / f".note-{rank}"


def _leave_note(partial: Path, rank: int, content: dict[str, Any]) -> None:
    # The rename makes the note appear with its whole content.
    path = partial / f".unfinished-{rank}"
    path.write_text(json.dumps(content))
    path.rename(_note(partial, rank))


def _write_files(save: Save, values: Any, *, name: str) -> dict[str, Any]:
    """Write a rank's tensors, objects and small files to the disk. Returns the place of each of them."""
    tensors, objects = [], []
    with (save.partial / name).open("wb", buffering=0) as file:
        stream = _Hashed(file)
        archives = ArchiveFile(stream)
        for shard, saved in zip(save.shards, values, strict=True):
            begin = stream.position
            archives.append(Kind(saved.dtype, tuple(saved.shape)), blocks_of(raw_bytes(saved)))
            place = [begin, stream.position - begin]
            dtype = str(saved.dtype).removeprefix("torch.")
            tensors.append([shard.key, dtype, shard.shape, shard.offsets, list(saved.shape), name, place])
        for key, content in save.objects.items():
            objects.append([key, name, [stream.position, len(content)]])
            stream.write(content)
        # The first rank publishes once it has all notes, so the files must be on the disk before the note.
        os.fsync(file.fileno())
    files = {name: stream.entry}
    for small, content in save.small.items():
        files[small] = _write_file(save.partial / small, content)
    return {"tensors": tensors, "objects": objects, "files": files}


def _write_file(path: Path, content: bytes) -> dict[str, Any]:
    with path.open("wb", buffering=0) as file:
        stream = _Hashed(file)
        stream.write(content)
        os.fsync(file.fileno())
    return stream.entry


def _metadata(notes: Sequence[dict[str, Any]]) -> Metadata:
    """The metadata of torch.distributed.checkpoint: the file and place of each rectangle of each tensor.

    A save of 16,384 ranks has a million rectangles. An object that is used twice is pickled once.
    """
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    size_of = lru_cache(maxsize=None)(torch.Size)
    for note in notes:
        for key, dtype, shape, offsets, sizes, name, place in note["tensors"]:
            if key not in entries:
                properties = TensorProperties(dtype=getattr(torch, dtype))
                entries[key] = TensorStorageMetadata(properties, size_of(tuple(shape)), [])
            chunks, begin = entries[key].chunks, size_of(tuple(offsets))
            index = MetadataIndex(key, begin, len(chunks))
            chunks.append(ChunkStorageMetadata(begin, size_of(tuple(sizes))))
            storage[index] = _StorageInfo(name, *place)
        for key, name, place in note["objects"]:
            entries[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = _StorageInfo(name, *place)
    return Metadata(entries, storage_data=storage, storage_meta=StorageMeta())


class _Hashed:
    """An unbuffered file that counts and hashes the bytes written to it, so that no file is read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self.position = file, blake3(), 0

    @property
    def entry(self) -> dict[str, Any]:
        """The manifest's entry of the file."""
        return {"bytes": self.position, "blake3": self._digest.hexdigest()}

    def write(self, block: bytes | memoryview) -> None:
        view, written = memoryview(block), 0
        self._digest.update(view)
        while written < len(view):
            written += self._file.write(view[written:])
        self.position += len(view)
