"""The results of each process of a run, and how they are merged.

Each process writes one file, its part, with one line for each input row. A line is written as soon as its
row is finished, so that no row waits for another. The number in a line restores the order of the input. The
name of an unfinished part ends in `.growing`. A process that restarts writes its part again from the journal.
"""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from megatron_post.storage.files import full_disk_explained
from megatron_post.storage.reading import reading
from megatron_post.synthesis.task import Event

_REPEATS = "repeats"  # the step under which repeated rows are counted
PARTS = ".parts"  # directory of the parts in the output
_NUMBER = b'{"number": '
_MISSING = 2**64 - 1


@dataclass(frozen=True)
class Drop:
    """Why an input row gave no rows.

    failed: the reason is an error of the recipe or a refusal by a model, which counts against `max_failed`.
    """

    step: str
    reason: str
    detail: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Result:
    """The result of one input row.

    number: index of the input row, from 0. rows: in the form that `rows.jsonl` has.
    found: values for the next generation. measures: pairs of a name and a number, for the report.
    """

    number: int
    id: str
    source: str
    rows: list[dict[str, Any]]
    dropped: Drop | None = None
    events: list[Event] = field(default_factory=list)
    found: list[dict[str, Any]] = field(default_factory=list)
    measures: list[tuple[str, float]] = field(default_factory=list)


class Part:
    """The part of one process while it is being written."""

    def __init__(self, path: Path, *, fingerprint: str) -> None:
        """path: as `part_path` returns it.

        fingerprint: hash of the run's record. It shows whether a part belongs to the same settings.
        """
        self._path, directory = path, path.parent
        self._growing = self._path.with_name(f"{self._path.name}.growing")
        with full_disk_explained(self._path):
            directory.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = self._growing.open("w", encoding="utf-8")
            self._file.write(_head(fingerprint).decode())

    def add(self, result: Result) -> None:
        """Write a line. Raises `DiskFull`."""
        with full_disk_explained(self._path):
            self._file.write(json.dumps(_as_json(result)) + "\n")

    def finish(self) -> None:
        """Flush the part to the disk and give it its final name."""
        with full_disk_explained(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._growing.rename(self._path)

    def close(self) -> None:
        """Stop writing. An unfinished part keeps its temporary name."""
        with full_disk_explained(self._path):
            self._file.close()


def part_path(directory: Path, rank: int, size: int, generation: int = 1) -> Path:
    return directory / f"part-{generation:05d}-{rank:05d}-of-{size:05d}.jsonl"


def is_part_of(path: Path, fingerprint: str) -> bool:
    """Whether this part exists and belongs to this run."""
    try:
        with path.open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return False
    return line == _head(fingerprint)


def _head(fingerprint: str) -> bytes:
    return json.dumps({"fingerprint": fingerprint}).encode() + b"\n"


def parts_in(directory: Path, fingerprint: str) -> list[Path]:
    """The parts of this run, finished or growing."""
    return [path for path in sorted(directory.glob("part-*")) if is_part_of(path, fingerprint)]


def results_of(parts: Sequence[Path]) -> Iterator[Result]:
    """Yield the results of all parts in the order of the input.

    Rows that are not finished are left out, and so are rows whose `unique` repeats that of an earlier row.
    This takes 16 bytes of memory for each result, and those of each `unique`.
    """
    return _without_repeats(_in_order(parts))


def _in_order(parts: Sequence[Path]) -> Iterator[Result]:
    offsets, owners = array("Q"), array("Q")
    files = [part.open("rb") for part in parts]
    try:
        for owner, (path, file) in enumerate(zip(parts, files, strict=True)):
            with reading(path, "a part of a run"):
                for number, offset in _numbers(file):
                    missing = number + 1 - len(offsets)
                    offsets.extend([_MISSING] * missing)
                    owners.extend([0] * missing)
                    offsets[number], owners[number] = offset, owner
        for offset, owner in zip(offsets, owners, strict=True):
            if offset != _MISSING:
                files[owner].seek(offset)
                with reading(parts[owner], "a part of a run"):
                    yield _result(json.loads(files[owner].readline()))
    finally:
        for file in files:
            file.close()


def _without_repeats(results: Iterable[Result]) -> Iterator[Result]:
    """Leave out repeated rows. An input row is dropped if all of its rows repeat earlier ones."""
    seen: set[bytes] = set()
    for result in results:
        rows = []
        for row in result.rows:
            mark = bytes.fromhex(row["provenance"].get("unique", ""))
            if mark not in seen:
                rows.append(row)
            if mark:
                seen.add(mark)
        if len(rows) < len(result.rows):
            repeats = Event(_REPEATS, result="repeat of an earlier row")
            events = [*result.events, *[repeats] * (len(result.rows) - len(rows))]
            dropped = None if rows else Drop(_REPEATS, "every row repeats an earlier one")
            result = replace(result, rows=rows, dropped=dropped, events=events)
        yield result


def _numbers(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Yield the number and the byte offset of each complete line after the first."""
    offset = len(file.readline())
    for line in file:
        if not line.endswith(b"\n"):  # the process is still writing this line
            return
        yield int(line[len(_NUMBER) : line.index(b",")]), offset
        offset += len(line)


def _as_json(result: Result) -> dict[str, Any]:
    """The same as `asdict`, which would be slower because it copies every value of every row."""
    events = [vars(event) for event in result.events]
    return {**vars(result), "dropped": result.dropped and vars(result.dropped), "events": events}


def _result(values: dict[str, Any]) -> Result:
    dropped = values["dropped"]
    return Result(
        values["number"],
        values["id"],
        values["source"],
        values["rows"],
        None if dropped is None else Drop(**dropped),
        [Event(**event) for event in values["events"]],
        values["found"],
        [(name, number) for name, number in values["measures"]],
    )
