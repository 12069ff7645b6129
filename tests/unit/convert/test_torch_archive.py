"""torch can read the archives, and their checksums are right."""

import io
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_post.convert import torch_archive
from megatron_post.convert.part_file import PartFile
from megatron_post.convert.safetensors_file import raw_bytes
from megatron_post.convert.source import Kind
from megatron_post.convert.torch_archive import ArchiveFile, blocks_of
from megatron_post.convert.torch_file import BadTorchFile, saved_tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 4, 6)])
def test_torch_reads_the_archives(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Two archives in one file are written in two blocks each.

    `torch.load` returns the tensors, and so do the places that are found without loading.
    """
    tensors = [torch.randn(shape).to(dtype) for _ in range(2)]
    path, places = tmp_path / "file", []
    with PartFile(path) as file:
        archives = ArchiveFile(file)
        for tensor in tensors:
            begin, data = archives.position, raw_bytes(tensor)
            archives.append(Kind(dtype, shape), [data[:6], data[6:]])
            places.append((begin, archives.position - begin))
    content = path.read_bytes()
    assert len(content) == archives.position and zlib.crc32(content) == archives.crc32
    for tensor, (offset, length) in zip(tensors, places, strict=True):
        archive = io.BytesIO(content[offset : offset + length])
        assert torch.equal(torch.load(archive, weights_only=True), tensor)
        assert zipfile.ZipFile(archive).testzip() is None
        saved = saved_tensors(path, offset=offset, length=length)[""]
        assert (saved.stored.dtype, saved.stored.shape) == (dtype, shape)
        assert saved.crc32 == zlib.crc32(raw_bytes(tensor))
        begin = saved.stored.offset
        assert content[begin : begin + tensor.nbytes] == bytes(raw_bytes(tensor))


@pytest.mark.parametrize("large", [False, True])
def test_the_archives_are_those_of_zipfile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """A limit of 1,000 bytes in place of 2 GiB makes both write ZIP64."""
    if large:
        monkeypatch.setattr(torch_archive, "_LARGEST", 1000)
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    tensor = torch.randn(100, 3)
    with PartFile(tmp_path / "file") as file:
        ArchiveFile(file).append(Kind(tensor.dtype, (100, 3)), [raw_bytes(tensor)])
    description = zipfile.ZipFile(tmp_path / "file").read("archive/data.pkl")

    class Stream(io.BytesIO):  # as it cannot seek, `zipfile` writes sizes and checksums behind the data
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), description)
        with archive.open(zipfile.ZipInfo("archive/data/0"), "w", force_zip64=large) as member:
            member.write(raw_bytes(tensor))
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")
    content = (tmp_path / "file").read_bytes()
    assert content == stream.getvalue()
    assert torch.equal(torch.load(io.BytesIO(content), weights_only=True), tensor)


@pytest.mark.parametrize("values", [torch.tensor(3), torch.arange(5, dtype=torch.int32), torch.zeros(0, 2)])
def test_other_types_and_shapes(tmp_path: Path, values: Tensor) -> None:
    with PartFile(tmp_path / "file") as file:
        ArchiveFile(file).append(Kind(values.dtype, tuple(values.shape)), blocks_of(raw_bytes(values)))
    loaded = torch.load(tmp_path / "file", weights_only=True)
    assert torch.equal(loaded, values) and loaded.dtype == values.dtype


def test_other_files_are_refused(tmp_path: Path) -> None:
    """A file that is not an archive of plain tensors is refused with its name."""
    path = tmp_path / "file"
    for content, message in (
        (b"", "not a file of plain tensors"),
        (b"PK\x03\x04 and no more", "not a file of plain tensors"),
        (zlib.compress(b"x"), "not a file of plain tensors"),
    ):
        path.write_bytes(content)
        with pytest.raises(BadTorchFile, match=f"{path}: {message}"):
            saved_tensors(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(BadTorchFile, match="holds a list"):
        saved_tensors(path)
    torch.save({"a": torch.ones(4, 4).t()[1:]}, path)
    with pytest.raises(BadTorchFile, match="'a' is not a contiguous tensor"):
        saved_tensors(path)
    with pytest.raises(BadTorchFile, match="ends at byte"):
        saved_tensors(path, offset=10, length=10**9)


def test_errors_of_the_disk_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed flush and a failed write are both raised to the caller."""
    import os

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output"), PartFile(tmp_path / "a") as file:
        import time

        time.sleep(0.2)
        file.write(b"x")
    monkeypatch.undo()
    monkeypatch.setattr(os, "write", lambda descriptor, data: fail(descriptor))
    with pytest.raises(OSError, match="Input/output"), PartFile(tmp_path / "b") as file:
        file.write(b"x")
