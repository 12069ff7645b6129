"""Finds the content of a `torch.save`d file, and the places of its tensors, without running its pickle.

torch writes a zip archive whose members are stored uncompressed: a small pickle that describes the tensors,
and the bytes of each storage. Only torch's own `weights_only` unpickler reads the pickle, and only in this
module.
"""

import io
import os
import zipfile
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from megatron_post.convert.safetensors_file import Stored


class BadTorchFile(ValueError):
    """A file that is damaged or holds anything but plain tensors. The message names it."""


@dataclass(frozen=True)
class Saved:
    """A tensor of a saved file, and the CRC-32 of its bytes, or None if it shares them with other tensors."""

    stored: Stored
    crc32: int | None


def load_plain(path: Path, *, offset: int = 0, length: int | None = None) -> Any:
    """The tensors and plain values of the archive in bytes [offset, offset + length) of a file.

    Raises `BadTorchFile` if there is no such archive, and for a pickle that refers to anything else. Nothing
    in it is run.
    """
    with _Window(path, offset, length) as window:
        return _load(window, path, map_location="cpu")


def saved_tensors(path: Path, *, offset: int = 0, length: int | None = None) -> dict[str, Saved]:
    """Tensors by name of the archive in bytes [offset, offset + length) of a file.

    The name of a single tensor is "". Raises `BadTorchFile` as `load_plain` does, and for tensors that are
    not contiguous in the file.
    """
    with _Window(path, offset, length) as window:
        content = _load(window, path, map_location="meta")
        try:
            with zipfile.ZipFile(window) as archive:
                members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        except Exception as error:  # a damaged archive can raise any exception
            raise BadTorchFile(f"{path}: not a file of plain tensors: {error}") from error
    content = {"": content} if isinstance(content, Tensor) else content
    if not isinstance(content, dict):
        raise BadTorchFile(f"{path}: holds a {type(content).__name__}, not tensors by name")
    return {
        name: _saved(path, name, value, offset, window.length, members) for name, value in content.items()
    }


def reason_of(error: Exception) -> str:
    """The reason why torch's `weights_only` reader refused a file, on one line.

    torch's advice to load the file without `weights_only` is left out.
    """
    reason = error.__context__ if str(error).startswith("Weights only") else None
    line = str(reason or error).strip().partition("\n")[0].partition(". Please")[0]
    return line.rstrip(".") or type(error).__name__


def _saved(
    path: Path, name: Any, value: Any, offset: int, length: int, members: list[zipfile.ZipInfo]
) -> Saved:
    plain = isinstance(name, str) and name.isprintable()
    dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested
    if not plain or not dense or not value.is_contiguous():
        raise BadTorchFile(f"{path}: {name!r} is not a contiguous tensor")
    storage = value.untyped_storage()
    begin = storage._checkpoint_offset  # where torch.load would have read
    if begin is None:
        raise BadTorchFile(f"{path}: {name}: has no bytes in the file")
    place = begin + value.storage_offset() * value.itemsize
    member = members[bisect_right(members, begin, key=lambda m: m.header_offset) - 1]
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != storage.nbytes():
        raise BadTorchFile(f"{path}: {name}: its bytes are not stored plainly")
    if not 0 <= place <= begin + storage.nbytes() - value.nbytes <= length - value.nbytes:
        raise BadTorchFile(f"{path}: {name}: lies beyond its storage or the file's end")
    whole = value.nbytes == storage.nbytes()
    return Saved(
        Stored(value.dtype, tuple(value.shape), offset + int(place)), crc32=member.CRC if whole else None
    )


def _load(window: "_Window", path: Path, *, map_location: str) -> Any:
    try:
        return torch.load(cast(IO[bytes], window), map_location=map_location, weights_only=True)
    except Exception as error:  # a malformed pickle can raise any exception
        raise BadTorchFile(
            f"{path}: not a file of plain tensors; nothing in it was run: {reason_of(error)}"
        ) from error


class _Window(io.RawIOBase):
    """Bytes [offset, offset + length) of a file, as a file."""

    def __init__(self, path: Path, offset: int, length: int | None) -> None:
        """Raises `BadTorchFile` if the file cannot be opened or ends too early."""
        super().__init__()
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise BadTorchFile(f"{path}: {error.strerror}") from error
        size = os.fstat(self._file.fileno()).st_size
        self._offset, self._position = offset, 0
        self.length = size - offset if length is None else length
        if offset < 0 or self.length < 0 or offset + self.length > size:
            self._file.close()
            raise BadTorchFile(f"{path}: ends at byte {size}, before the data at byte {offset}")

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        if origin + offset < 0:
            raise OSError("seek before the beginning")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)[: max(0, self.length - self._position)]
        count = os.preadv(self._file.fileno(), [view], self._offset + self._position)
        self._position += count
        return count
