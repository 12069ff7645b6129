"""Writes tensors as `torch.save` does, but block by block, without holding a whole tensor."""

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

from megatron_post.convert.part_file import PartFile
from megatron_post.convert.source import Kind
from megatron_post.storage.checksums import crc32

_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
}
_LOCAL = struct.Struct("<4s5H3L2H")  # the header in front of a member
_AFTER = struct.Struct("<4s3L")  # the checksum and sizes behind a member
_ENTRY = struct.Struct("<4s6H3L5H2L")  # a member's entry in the directory
_END = struct.Struct("<4s4H2LH")  # the end of the directory
_VERSION, _DESCRIBED, _DATE = 20, 8, 33  # no ZIP64; checksum behind the data; 1980-01-01
_UNIX, _OWNER = 3 << 8, 0o600 << 16


class ArchiveFile:
    """A file of archives, one after another. position: its end. crc32: of all bytes written so far.

    The archives are the bytes that Python's `zipfile` would write. It is not used, because it computes the
    checksums with zlib, which is slower than the disk.
    """

    def __init__(self, file: PartFile) -> None:
        self.position, self.crc32 = 0, 0
        self._file = file

    def append(self, kind: Kind, blocks: Iterable[memoryview]) -> None:
        """Write a tensor. blocks: its bytes in C order, less than 4 GiB.

        See `PartFile` for how long a block must stay unchanged.
        """
        begin = self.position
        entries = [
            self._member("archive/data.pkl", [_description(kind)], begin),
            self._member("archive/data/0", blocks, begin),
            self._member("archive/version", [b"3\n"], begin),
        ]
        place = self.position - begin
        self._write(b"".join(entries))
        size = self.position - begin - place
        self._write(_END.pack(b"PK\5\6", 0, 0, len(entries), len(entries), size, place, 0))

    def _member(self, name: str, blocks: Iterable[bytes | memoryview], begin: int) -> bytes:
        """Write a member of the archive that begins at `begin`. Returns its entry in the directory."""
        place, key = self.position - begin, name.encode()
        head = (_DESCRIBED, 0, 0, _DATE)  # 0: stored without compression, at midnight
        self._write(_LOCAL.pack(b"PK\3\4", _VERSION, *head, 0, 0, 0, len(key), 0) + key)
        size, checksum = 0, 0
        for block in blocks:
            size, checksum = size + len(block), crc32(block, checksum)
            self._write(block)
        self._write(_AFTER.pack(b"PK\7\x08", checksum, size, size))
        numbers = (checksum, size, size, len(key), 0, 0, 0, 0, _OWNER, place)
        return _ENTRY.pack(b"PK\1\2", _UNIX | _VERSION, _VERSION, *head, *numbers) + key

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self.position += len(content)
        self.crc32 = crc32(content, self.crc32)


class _Storage:
    """Stands in the pickle for the bytes that follow it."""


class _Contiguous:
    """Pickles as a contiguous tensor of this shape whose storage is a `_Storage`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self._shape, device="meta").stride()
        return _rebuild_tensor_v2, (_Storage(), 0, self._shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, kind: Kind) -> None:
        # This is the protocol that torch.save uses.
        super().__init__(file, protocol=2)
        self._kind = kind

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        dtype = self._kind.dtype
        return "storage", _STORAGES[dtype], "0", "cpu", self._kind.nbytes // dtype.itemsize


def _description(kind: Kind) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, kind).dump(_Contiguous(kind.shape))
    return stream.getvalue()
