"""Where the tensors of a `torch.save`d file lie in it, without reading them and without running its pickle.

torch writes a zip archive whose members are stored uncompressed: a small pickle that describes the tensors,
read here by torch's own `weights_only` unpickler, and the bytes of each storage.
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
    """A file that holds anything but plain tensors, or is damaged; the message names it."""


@dataclass(frozen=True)
class Saved:
    """A tensor of a saved file, and the CRC-32 of its bytes; None where it shares them with others."""

    stored: Stored
    crc32: int | None


def saved_tensors(path: Path, *, offset: int = 0, length: int | None = None) -> dict[str, Saved]:
    """Tensors by name of an archive that takes bytes [offset, offset + length) of a file; one alone is "".

    Raises `BadTorchFile` for what is no such archive, for a pickle that asks for more than tensors (it is not
    run), and for tensors that are not one contiguous piece of the file.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            window = _Window(file.fileno(), offset, size - offset if length is None else length)
            if offset < 0 or window.length < 0 or offset + window.length > size:
                raise BadTorchFile(f"{path}: ends at byte {size}, before the tensor that belongs at {offset}")
            content = torch.load(cast(IO[bytes], window), map_location="meta", weights_only=True)
            with zipfile.ZipFile(window) as archive:
                members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    except BadTorchFile:
        raise
    except Exception as error:  # a pickle that is no pickle can make its reader stumble over anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadTorchFile(f"{path}: not a file of plain tensors; nothing in it was run: {reason}") from error
    content = {"": content} if isinstance(content, Tensor) else content
    if not isinstance(content, dict):
        raise BadTorchFile(f"{path}: holds a {type(content).__name__}, not tensors by name")
    return {
        name: _saved(path, name, value, offset, window.length, members) for name, value in content.items()
    }


def _saved(
    path: Path, name: Any, value: Any, offset: int, length: int, members: list[zipfile.ZipInfo]
) -> Saved:
    plain = isinstance(name, str) and name.isprintable()
    if not plain or not isinstance(value, Tensor) or not value.is_contiguous():
        raise BadTorchFile(f"{path}: {name!r} is not a contiguous tensor")
    storage = value.untyped_storage()
    begin = storage._checkpoint_offset
    assert begin is not None, "torch.load onto the meta device says where it would have read"
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


class _Window(io.RawIOBase):
    """Bytes [offset, offset + length) of an open file, as a file."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._offset, self.length, self._position = descriptor, offset, length, 0

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
        count = os.preadv(self._descriptor, [view], self._offset + self._position)
        self._position += count
        return count
