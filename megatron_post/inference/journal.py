"""Records answers in files of JSON lines. Each answer is appended before it is used.

A line begins with a checksum of its remainder, as in
`{"crc32":"0f1e2d3c","key":"...","kind":"reply","entry":{...}}`. A process that is killed leaves at most one
incomplete line, which is removed when the process starts again.
"""

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_post.storage.checksums import crc32
from megatron_post.storage.files import full_disk_explained
from megatron_post.storage.lock import sole_writer
from megatron_post.storage.reading import LARGEST_LINE

Make = Callable[[], Awaitable[tuple[str, dict[str, Any]]]]
KEY_DIGITS = 32  # with 128 bits, two of 10^12 requests have the same key with a probability of 10^-15
_CRC, _KEY = b'{"crc32":"', b'","key":"'
_CRC_AT = len(_CRC)
_KEY_AT = _CRC_AT + 8 + len(_KEY)
_BODY_AT = _CRC_AT + 8 + 2  # after the checksum's quote and comma
_OFFSET_BITS = 48


def key_of(**parts: Any) -> str:
    """The key of a request or a program, which is a hash of everything that its answer depends on.

    parts: values that JSON can represent. The order of an object's keys does not matter.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


@dataclass
class _Journalled:
    """A journal file, with the number of bytes and lines that have been read."""

    path: Path
    file: IO[bytes]
    offset: int = 0
    lines: int = 0


class Journal:
    """The journal files of a directory, one for each process that writes.

    Memory only has the position of each entry, which takes about 200 bytes.
    """

    def __init__(self, directory: str | Path, writer: int = 0) -> None:
        """Read all files of the directory and lock this writer's own, `journal-00000.jsonl` for writer 0.

        Raises `ValueError` if another process has the file, and for a damaged line, with its number.
        """
        self._directory = Path(directory)
        self._places: dict[bytes, int] = {}
        self._making: dict[str, asyncio.Event] = {}
        self._files: list[_Journalled] = []  # this writer's file is the first
        path = self._directory / f"journal-{writer:05d}.jsonl"
        with full_disk_explained(self._directory), contextlib.ExitStack() as stack:
            self._directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(sole_writer(_lock_of(path), of=path))
            self._writing = stack.enter_context(path.open("ab", buffering=0))
            stack.callback(lambda: [journalled.file.close() for journalled in self._files])
            self._own = self._open(path)
            self._writing.truncate(self._own.offset)  # removes an incomplete line of a killed process
            self.refresh()
            self._stack = stack.pop_all()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush to the disk and release the lock."""
        with self._stack, full_disk_explained(self._own.path):
            os.fsync(self._writing.fileno())

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry of a key, or None if there is none.

        If several files have one, this writer's file has priority, and then the file whose name comes first.
        """
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        file = self._files[place >> _OFFSET_BITS].file
        file.seek(place & (1 << _OFFSET_BITS) - 1)
        entry: dict[str, Any] = json.loads(file.readline())["entry"]
        return entry

    async def once(self, key: str, make: Make) -> dict[str, Any]:
        """The entry of a key. If there is none, `make` gives its kind and the entry, which is kept.

        Of several callers that wait for one key, one makes it. If that fails, the next one tries.
        """
        while (making := self._making.get(key)) is not None:
            await making.wait()
        entry = self.get(key)
        if entry is None:
            self._making[key] = asyncio.Event()
            try:
                kind, entry = await make()
                self.append(key, kind, entry)
            finally:
                self._making.pop(key).set()
        return entry

    def append(self, key: str, kind: str, entry: dict[str, Any]) -> None:
        """Append an entry. After this returns, the entry survives a kill of this process.

        kind: the kind of the entry, for people who read the file. Raises `DiskFull`, and then appends
        nothing.
        """
        body = json.dumps({"key": key, "kind": kind, "entry": entry}, separators=(",", ":")).encode()[1:]
        line = _CRC + b"%08x" % crc32(body) + b'",' + body + b"\n"
        own = self._own
        with full_disk_explained(own.path):
            try:
                written = 0
                while written < len(line):
                    written += self._writing.write(line[written:])
            except OSError:
                self._writing.truncate(own.offset)
                raise
        self._places[bytes.fromhex(key)] = own.offset
        own.offset, own.lines = own.offset + len(line), own.lines + 1

    def refresh(self) -> None:
        """Read the entries that other processes have appended since the last call."""
        known = {journalled.path: journalled for journalled in self._files}
        for path in sorted(self._directory.glob("journal-*.jsonl")):
            if path not in known:
                self._open(path)
            elif path != self._own.path:
                self._read(known[path])

    def _open(self, path: Path) -> _Journalled:
        self._files.append(_Journalled(path, path.open("rb")))
        self._read(self._files[-1])
        return self._files[-1]

    def _read(self, found: _Journalled) -> None:
        """Record the positions of a file's new entries, up to its last complete line."""
        index = next(i for i, file in enumerate(self._files) if file is found) << _OFFSET_BITS
        found.file.seek(found.offset)
        while (line := found.file.readline(LARGEST_LINE)).endswith(b"\n"):
            if not _is_whole(line):
                if len(self._files) > 1 and _is_being_written(found.path):
                    return  # a shared file system may show the end of a line before its beginning
                raise ValueError(
                    f"{found.path}:{found.lines + 1}: this line of the journal is damaged: its checksum "
                    "differs. Remove the line, and what it held is asked again"
                )
            key = bytes.fromhex(line[_KEY_AT : _KEY_AT + KEY_DIGITS].decode())
            self._places.setdefault(key, index | found.offset)
            found.offset, found.lines = found.offset + len(line), found.lines + 1


def read_entries(directory: str | Path, keys: Collection[str]) -> dict[str, dict[str, Any]]:
    """The entries of `keys`, even while other processes write. Keys without an entry are left out."""
    wanted, found = {key.encode() for key in keys}, dict[str, dict[str, Any]]()
    for path in sorted(Path(directory).glob("journal-*.jsonl")):
        with path.open("rb") as file:
            while line := file.readline(LARGEST_LINE):
                key = line[_KEY_AT : _KEY_AT + KEY_DIGITS]
                if key in wanted and line.endswith(b"\n") and _is_whole(line):
                    found.setdefault(key.decode(), json.loads(line)["entry"])
    return found


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _is_being_written(path: Path) -> bool:
    """Whether another process has this file open for writing."""
    try:
        with sole_writer(_lock_of(path), of=path):
            return False
    except ValueError:
        return True


def _is_whole(line: bytes) -> bool:
    return (
        line.startswith(_CRC)
        and line[_KEY_AT - len(_KEY) : _KEY_AT] == _KEY
        and line[_CRC_AT : _CRC_AT + 8] == b"%08x" % crc32(line[_BODY_AT:-1])
    )
