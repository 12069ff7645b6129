"""Writes tensors as `torch.save` does, but block by block, without holding a whole tensor."""

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch._utils import _rebuild_tensor_v2

from megatron_post.convert.source import Kind
from megatron_post.storage.checksums import crc32

_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.int32: torch.IntStorage,
    torch.int64: torch.LongStorage,
    torch.uint8: torch.ByteStorage,
}
_LOCAL = struct.Struct("<4s5H3L2H")  # the header in front of a member
_AFTER = struct.Struct("<4s3L")  # the checksum and sizes behind a member
_LARGE_AFTER = struct.Struct("<4sL2Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # a member's entry in the directory
_LARGE_SIZES = struct.Struct("<2H2Q")  # what a header has for a member of more than `_LARGEST` bytes
_END = struct.Struct("<4s4H2LH")  # the end of the directory
_LARGE_END = struct.Struct("<4sQ2H2L4Q")
_LARGE_PLACE = struct.Struct("<4sLQL")  # the place of `_LARGE_END`
_LARGEST, _IN_EXTRA = 2**31 - 1, 2**32 - 1  # the value of a field whose number is in a larger field
_VERSION, _LARGE_VERSION = 20, 45  # of ZIP, without and with ZIP64
_DESCRIBED, _DATE = 8, 33  # the checksum is behind the data; 1980-01-01
_BLOCK_BYTES = 2**22
_UNIX, _OWNER = 3 << 8, 0o600 << 16


class ArchiveFile:
    """A file of archives, one after another. position: its end. crc32: of all bytes written so far.

    The archives are the bytes that Python's `zipfile` would write. It is not used, because it computes the
    checksums with zlib, which is slower than the disk.
    """

    def __init__(self, file: "_Writer") -> None:
        self.position, self.crc32 = 0, 0
        self._file = file

    def append(self, kind: Kind, blocks: Iterable[memoryview]) -> None:
        """Write a tensor. blocks: its bytes in C order.

        See `PartFile` for how long a block must stay unchanged.
        """
        begin = self.position
        entries = [
            self._member("archive/data.pkl", [_description(kind)], begin),
            self._member("archive/data/0", blocks, begin, large=kind.nbytes > _LARGEST),
            self._member("archive/version", [b"3\n"], begin),
        ]
        place = self.position - begin
        self._write(b"".join(entries))
        after = self.position - begin
        count, size = len(entries), after - place
        if place > _LARGEST:
            versions = (_LARGE_VERSION, _LARGE_VERSION, 0, 0)
            self._write(_LARGE_END.pack(b"PK\6\6", 44, *versions, count, count, size, place))
            self._write(_LARGE_PLACE.pack(b"PK\6\7", 0, after, 1))
        self._write(_END.pack(b"PK\5\6", 0, 0, count, count, size, min(place, _IN_EXTRA), 0))

    def _member(
        self, name: str, blocks: Iterable[bytes | memoryview], begin: int, *, large: bool = False
    ) -> bytes:
        """Write a member of the archive that begins at `begin`. Returns its entry in the directory."""
        place, key = self.position - begin, name.encode()
        version = _LARGE_VERSION if large else _VERSION
        head = (version, _DESCRIBED, 0, 0, _DATE)  # 0: stored without compression, at midnight
        unknown = (_IN_EXTRA,) * 2 if large else (0, 0)
        extra = _LARGE_SIZES.pack(1, 16, 0, 0) if large else b""
        self._write(_LOCAL.pack(b"PK\3\4", *head, 0, *unknown, len(key), len(extra)) + key + extra)
        size, checksum = 0, 0
        for block in blocks:
            size, checksum = size + len(block), crc32(block, checksum)
            self._write(block)
        self._write((_LARGE_AFTER if large else _AFTER).pack(b"PK\7\x08", checksum, size, size))
        wide = [size] * 2 * large + [place] * (place > _LARGEST)
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        sizes = (_IN_EXTRA if large else size,) * 2
        at = _IN_EXTRA if place > _LARGEST else place
        version = _LARGE_VERSION if extra else _VERSION
        numbers = (*head[1:], checksum, *sizes, len(key), len(extra), 0, 0, 0, _OWNER, at)
        return _ENTRY.pack(b"PK\1\2", _UNIX | version, version, *numbers) + key + extra

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self.position += len(content)
        self.crc32 = crc32(content, self.crc32)


def blocks_of(content: memoryview) -> Iterator[memoryview]:
    """Blocks that stay in the processor's cache while they are checksummed, hashed and written."""
    for place in range(0, len(content), _BLOCK_BYTES):
        yield content[place : place + _BLOCK_BYTES]


class _Writer(Protocol):
    def write(self, block: bytes | memoryview) -> None: ...


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
