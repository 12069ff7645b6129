"""Writes tensors as `torch.save` does, but block by block, without holding a whole tensor."""

import io
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import IO, Any, cast

import torch
from torch._utils import _rebuild_tensor_v2

from megatron_post.convert.part_file import PartFile
from megatron_post.convert.source import Kind

_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
}
_POLYNOMIAL = 0xEDB88320  # the polynomial of CRC-32, reflected


class ArchiveFile:
    """A file of archives, one after another. position: its end. crc32: of all bytes written so far."""

    def __init__(self, file: PartFile) -> None:
        self.position, self.crc32 = 0, 0
        self._file = file
        self._data, self._in_data, self._unsummed = zipfile.ZipInfo(), False, 0

    def append(self, kind: Kind, blocks: Iterable[memoryview]) -> None:
        """Write a tensor. blocks: its bytes in C order.

        See `PartFile` for how long a block must stay unchanged.
        """
        # zipfile sees a stream that cannot seek. It writes sizes and checksums after the data, as torch does.
        with zipfile.ZipFile(cast(IO[bytes], self), "w") as archive:
            archive.writestr(zipfile.ZipInfo("archive/data.pkl"), _description(kind))
            self._data = zipfile.ZipInfo("archive/data/0")
            with archive.open(self._data, "w") as member:
                self._in_data = True
                for block in blocks:
                    member.write(block)
                self._in_data = False
            archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")

    def write(self, content: Any) -> int:
        """Write a piece of an archive for `zipfile`.

        `zipfile` already checksums the data. That checksum is joined to the file's, and not computed again.
        """
        self._file.write(content)
        self.position += len(content)
        if self._in_data:
            self._unsummed += len(content)
            return len(content)
        if self._unsummed:
            self.crc32 = joined_crc32(self.crc32, self._data.CRC, self._unsummed)
            self._unsummed = 0
        self.crc32 = zlib.crc32(content, self.crc32)
        return len(content)

    def flush(self) -> None:
        """Does nothing, because nothing is buffered."""


def joined_crc32(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of two consecutive pieces, from the CRC-32 of each and the length of the second.

    As polynomials over GF(2), it is first * x^(8 * second_bytes) + second, modulo the polynomial of CRC-32.
    """
    power, square, exponent = 1 << 31, 1 << 30, 8 * second_bytes  # x^0, x^1
    while exponent:
        if exponent & 1:
            power = _product(power, square)
        square = _product(square, square)
        exponent >>= 1
    return _product(power, first) ^ second


def _product(a: int, b: int) -> int:
    """a * b modulo the polynomial. The highest bit is x^0."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return result


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
