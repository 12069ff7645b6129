"""The safetensors format: 8 bytes of length, a JSON header, and the bytes of the tensors without gaps.

Headers are read as if an adversary had written them. Data is read with `pread` and never memory-mapped, so a
process holds only the buffer that it requested, however large the file is.

The library safetensors 0.8 was compared. Its `save_file` takes all tensors of a file at once, and cannot
write one while later ones are still being read. Its `safe_open` maps the whole file into memory.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_post.convert.source import Kind
from megatron_post.storage.reading import plain_file

# The limit of the `safetensors` library.
LARGEST_HEADER = 100_000_000
# The library writes tensors of different dtypes in this order.
DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class BadSafetensors(ValueError):
    """A malformed file. The message names the file, the tensor and the fault."""


@dataclass(frozen=True)
class Stored(Kind):
    """A tensor in a file. Its bytes are [offset, offset + nbytes) of the file, in C order."""

    offset: int


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a file by name. Only the header is read.

    Raises `BadSafetensors` unless the header is plain JSON of known dtypes whose tensors fill the rest of the
    file exactly, so that each byte belongs to one of them.
    """
    try:
        with plain_file(path, "file").open("rb") as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(LARGEST_HEADER, size - 8):
                raise BadSafetensors(_no_header(path, start, length, size))
            header = json.loads(file.read(length).decode(), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise BadSafetensors(f"{path}: not a readable safetensors file: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadSafetensors):
            raise
        raise BadSafetensors(f"{path}: not a readable safetensors file: bad header: {error}") from error
    if not isinstance(header, dict):
        raise BadSafetensors(f"{path}: not a readable safetensors file: the header is not an object")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, value, data=8 + length) for name, value in header.items()}
    _check_tiling(path, tensors, start=8 + length, end=size)
    return tensors


def header_of(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, Stored]]:
    """The first bytes of a file of these tensors, and the place of each tensor in it.

    The bytes are those that the `safetensors` library writes: tensors are ordered by dtype and then name, and
    the header is padded to a multiple of 8.
    """
    ranks = list(_CODES)
    order = sorted(tensors, key=lambda name: (ranks.index(tensors[name][0]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape = tensors[name]
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: Stored(*tensors[name], start + header[name]["data_offsets"][0]) for name in order}
    return len(text).to_bytes(8, "little") + text, places


def write_file(path: Path, kinds: Mapping[str, Kind], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file of tensors, which may come in any order and one at a time, and flush it to the disk."""
    header, places = header_of({name: (kind.dtype, kind.shape) for name, kind in kinds.items()})
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            file.seek(places[name].offset)
            file.write(raw_bytes(tensor.contiguous()))
        file.flush()
        os.fsync(file.fileno())


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor. Writing to the view writes to the tensor."""
    assert tensor.is_contiguous()
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
    return memoryview(flat.numpy().data)


class OpenFiles:
    """Reads pieces of files. The 16 most recently opened files stay open."""

    def __init__(self) -> None:
        self._files: dict[Path, FileIO] = {}

    def read(self, path: Path, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on.

        Raises `BadSafetensors` if the file ends too early.
        """
        if path not in self._files:
            if len(self._files) == 16:
                self._files.pop(next(iter(self._files))).close()
            self._files[path] = path.open("rb", buffering=0)
        descriptor, done = self._files[path].fileno(), 0
        while done < len(target):
            count = os.preadv(descriptor, [target[done:]], offset + done)
            if count == 0:
                raise BadSafetensors(f"{path}: ends at byte {offset + done}, while it was read")
            done += count


def read_tensor(files: OpenFiles, path: Path, stored: Stored) -> Tensor:
    """A whole tensor of a file in its own dtype."""
    values = torch.empty(stored.shape, dtype=stored.dtype)
    files.read(path, stored.offset, raw_bytes(values))
    return values


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return result


def _entry(path: Path, name: str, value: Any, *, data: int) -> Stored:
    """A header entry whose offset is counted from the beginning of the file.

    Python's integers do not overflow, so an absurd size simply fails the comparison.
    """
    if not name.isprintable():
        raise BadSafetensors(f"{path}: malformed tensor name {name[:80]!r}")
    try:
        code, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, start, end]
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise BadSafetensors(f"{path}: {name}: malformed header entry {str(value)[:200]}") from None
    if not isinstance(code, str) or code not in DTYPES:
        raise BadSafetensors(f"{path}: {name}: unknown dtype {str(code)[:40]!r}")
    stored = Stored(DTYPES[code], tuple(shape), data + start)
    if end - start != stored.nbytes:
        raise BadSafetensors(
            f"{path}: {name}: offsets [{start}, {end}] hold {end - start} bytes, "
            f"but {code} {shape} takes {stored.nbytes}"
        )
    return stored


def _check_tiling(path: Path, tensors: dict[str, Stored], *, start: int, end: int) -> None:
    position = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != position:
            what = "overlaps the tensor before it" if stored.offset < position else "leaves a gap before it"
            raise BadSafetensors(f"{path}: {name}: begins at byte {stored.offset}, which {what}")
        position += stored.nbytes
        if position > end:
            raise BadSafetensors(
                f"{path}: {name}: ends at byte {position}, the file at {end}: truncated or damaged"
            )
    if position != end:
        raise BadSafetensors(f"{path}: {end - position} bytes after the last tensor")


def _no_header(path: Path, start: bytes, length: int, size: int) -> str:
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return f"{path}: not a readable safetensors file: a pickle under another name; nothing in it was run"
    return (
        f"{path}: not a readable safetensors file: its header would take {length} of the file's {size} bytes"
    )
