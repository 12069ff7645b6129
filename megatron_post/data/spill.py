"""Keeps the rendered units of a group in files, so that a pack of any size needs little memory.

A journal names every finished batch of rows with a digest of the batch. `data pack` that starts again after
it was killed compares the digests in order, and renders only the batches that come after the last equal one.
"""

import json
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatron_post.data.units import SEGMENT, UNIT, UnitBlock, Units, units_of
from megatron_post.storage.checksums import crc32


@dataclass(frozen=True)
class _Entry:
    """A line of the journal. sizes: bytes in each file. crc: CRC-32 of the three parts, one after another."""

    digest: str
    sizes: tuple[int, ...]
    crc: int
    counts: dict[str, Any]


class Spill:
    """A context manager that appends blocks of units to three files, in the order of their batches.

    An existing spill is continued. `take` gives the counts of the batches that it holds. The first batch that
    it does not hold removes all later ones.
    """

    def __init__(self, directory: Path, name: str) -> None:
        """directory: it exists. name: the beginning of the files' names."""
        self._paths = [directory / f"{name}.{part}" for part in ("content", "segments", "units")]
        self._journal = directory / f"{name}.journal"
        self._ends = [0, 0, 0]
        self._journal_end = 0
        self._finished: deque[tuple[_Entry, int]] = deque()

    def __enter__(self) -> Self:
        flags = os.O_RDWR | os.O_CREAT
        self._files = [os.fdopen(os.open(path, flags, 0o666), "r+b") for path in self._paths]
        self._lines = os.fdopen(os.open(self._journal, flags, 0o666), "r+b")
        self._finished.extend(_entries(self._lines.read()))
        if not self._finished:
            self._forget()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (*self._files, self._lines):
            file.close()

    @property
    def may_hold(self) -> bool:
        """Whether there are batches of an earlier process that `take` has not given yet."""
        return bool(self._finished)

    def take(self, digest: str) -> dict[str, Any] | None:
        """The counts of the next batch if an earlier process has finished it, or None."""
        if self._finished:
            entry, line = self._finished[0]
            if entry.digest == digest and self._is_intact(entry):
                self._finished.popleft()
                self._ends = [end + size for end, size in zip(self._ends, entry.sizes, strict=True)]
                self._journal_end += line
                if not self._finished:
                    self._forget()  # a batch that was being written
                return entry.counts
            self._forget()
        return None

    def append(self, block: UnitBlock, counts: dict[str, Any], digest: str) -> None:
        """Add the next batch. The journal names it after its units are in the files."""
        if self._finished:
            self._forget()
        parts = [block.content, block.segments.tobytes(), block.units.tobytes()]
        for number, (file, part) in enumerate(zip(self._files, parts, strict=True)):
            file.write(part)
            file.flush()
            self._ends[number] += len(part)
        entry = {
            "digest": digest,
            "sizes": [len(part) for part in parts],
            "crc": _crc(parts),
            "counts": counts,
        }
        line = json.dumps(entry).encode() + b"\n"
        self._lines.write(line)
        self._lines.flush()
        self._journal_end += len(line)

    def units(self) -> Units:
        """All units. They can be read as long as this context lasts."""
        if self._finished:
            self._forget()
        segments = np.fromfile(self._paths[1], dtype=SEGMENT)
        units = np.fromfile(self._paths[2], dtype=UNIT)
        return units_of(_FileContent(self._files[0].fileno()), segments, units)

    def _is_intact(self, entry: _Entry) -> bool:
        # A machine that loses power may keep the journal's line and lose what it names.
        parts = []
        for file, start, size in zip(self._files, self._ends, entry.sizes, strict=True):
            parts.append(os.pread(file.fileno(), size, start))
        return [len(part) for part in parts] == list(entry.sizes) and _crc(parts) == entry.crc

    def _forget(self) -> None:
        """Remove everything that comes after the batches taken so far."""
        self._finished.clear()
        for file, end in zip((*self._files, self._lines), (*self._ends, self._journal_end), strict=True):
            file.truncate(end)
            file.seek(end)


class _FileContent:
    """The bytes of an open file. It is not mapped, since mapped pages count as memory of this process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __getitem__(self, part: slice) -> np.ndarray:
        content = os.pread(self._descriptor, part.stop - part.start, part.start)
        if len(content) != part.stop - part.start:
            raise OSError(f"the file of rendered rows ends before byte {part.stop}")
        return np.frombuffer(content, dtype=np.uint8)


def _entries(journal: bytes) -> list[tuple[_Entry, int]]:
    """The intact lines at the journal's beginning, with their lengths in bytes."""
    found = []
    for line in journal.splitlines(keepends=True):
        try:
            values = json.loads(line)
            entry = _Entry(values["digest"], tuple(values["sizes"]), values["crc"], values["counts"])
        except (ValueError, LookupError, TypeError):
            break
        if not line.endswith(b"\n") or len(entry.sizes) != 3:
            break
        found.append((entry, len(line)))
    return found


def _crc(parts: list[bytes]) -> int:
    value = 0
    for part in parts:
        value = crc32(part, value)
    return value
