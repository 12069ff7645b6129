"""An error while a checkpoint is written is reported with its reason, and the writer's thread ends."""

import errno
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_post.convert.safetensors_file import raw_bytes
from megatron_post.convert.source import Kind
from megatron_post.convert.torch_archive import ArchiveFile
from megatron_post.train.async_save import Save, SaveFailed, Saver, _Hashed
from megatron_post.train.shards import Shard


class _Full:
    """A file on a disk with `room` free bytes."""

    def __init__(self, room: int) -> None:
        self._room = room

    def write(self, data: Any) -> int:
        count = min(len(data), self._room)
        if not count:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._room -= count
        return count


def test_a_full_disk_is_reported_at_every_position() -> None:
    values = torch.arange(300.0)

    def save(room: int) -> int:
        stream = _Hashed(_Full(room))
        ArchiveFile(stream).append(Kind(values.dtype, (300,)), [raw_bytes(values)])
        return stream.position

    for room in range(0, save(10**6), 13):
        with pytest.raises(OSError, match="No space left on device"):
            save(room)


def _save(partial: Path, published: list[dict] | None) -> Save:
    def publish(*, files: dict) -> None:
        assert published is not None
        published.append(files)

    values = torch.ones(4)
    return Save(partial, [Shard("w", (8,), (0,), values)], {}, {}, None if published is None else publish)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_first_rank_publishes_after_all_notes(tmp_path: Path, asynchronous: bool) -> None:
    first, second = (Saver(rank, 2, torch.device("cpu")) for rank in range(2))
    published: list[dict] = []
    second.start(_save(tmp_path / "partial", None), asynchronous=asynchronous)
    first.start(_save(tmp_path / "partial", published), asynchronous=asynchronous)
    first.wait_for_copy()
    first.wait()
    assert first.error is None
    (files,) = published
    assert set(files) == {"__0_0.distcp", "__1_0.distcp", ".metadata"}
    assert {path.name for path in (tmp_path / "partial").iterdir()} == set(files)


def test_first_rank_fails_if_another_rank_has_failed(tmp_path: Path) -> None:
    first, second = (Saver(rank, 2, torch.device("cpu")) for rank in range(2))
    (tmp_path / "partial" / "__1_0.distcp").mkdir(parents=True)  # cannot be opened as a file
    published: list[dict] = []
    second.start(_save(tmp_path / "partial", None), asynchronous=True)
    second.wait()
    assert isinstance(second.error, IsADirectoryError)
    first.start(_save(tmp_path / "partial", published), asynchronous=True)
    first.wait()
    assert isinstance(first.error, SaveFailed) and "rank 1" in str(first.error)
    assert not published and not (tmp_path / "partial").exists()


def test_first_rank_fails_if_another_rank_cannot_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host has no memory left for the copy."""

    def no_memory(*_: object) -> None:
        raise RuntimeError("can't allocate memory")

    first, second = (Saver(rank, 2, torch.device("cpu")) for rank in range(2))
    monkeypatch.setattr(second, "_copy", no_memory)
    published: list[dict] = []
    first.start(_save(tmp_path / "partial", published), asynchronous=True)
    second.start(_save(tmp_path / "partial", None), asynchronous=True)
    second.wait_for_copy()
    for saver in (first, second):
        saver.wait()
    assert isinstance(first.error, SaveFailed) and "rank 1" in str(first.error)
    assert str(second.error) == "can't allocate memory"
    assert not published


def test_removing_the_directory_ends_the_wait(tmp_path: Path) -> None:
    """A user or another incarnation's claim removes the directory, so rank 1's note never comes."""
    first = Saver(0, 2, torch.device("cpu"))
    published: list[dict] = []
    first.start(_save(tmp_path / "partial", published), asynchronous=True)
    while not list(tmp_path.glob("partial/__0_0.distcp")):
        time.sleep(0.01)
    shutil.rmtree(tmp_path / "partial", ignore_errors=True)
    first.wait()
    assert "partial was removed while rank 0 waited for rank 1" in str(first.error) or isinstance(
        first.error, FileNotFoundError
    )
    assert not published
