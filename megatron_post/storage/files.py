"""Writes small files that are either complete or absent, and reads and writes JSON lines."""

import contextlib
import errno
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_post.storage.reading import LARGEST_LINE, plain_file, reading


class DiskFull(ValueError):
    """The disk or a quota is full. The message says what is kept and what to do."""


def is_disk_full(error: OSError) -> bool:
    """Whether the disk, a quota or the process's limit on file sizes is exhausted."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Raises `DiskFull` if the disk is full while `path` is written within this context."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFull(
            f"{path}: {error.strerror}; all that was finished before is kept: free some space and "
            "run the same command again"
        ) from error


def write_durably(path: Path, text: str) -> None:
    """Write a file in place, and flush it to the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name. What is written there in this context is flushed to the disk and renamed.

    After an error there is no file of either name. Raises `DiskFull`.
    """
    with full_disk_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in path.parent.glob(f".{glob.escape(path.name)}.*"):
            left_by_a_kill.unlink(missing_ok=True)
        growing = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            yield growing
            with growing.open("rb") as file:
                os.fsync(file.fileno())
            growing.rename(path)
        except BaseException:
            growing.unlink(missing_ok=True)
            raise


def write_pieces(path: Path, pieces: Iterable[str]) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it. Raises `DiskFull`."""
    with whole_file(path) as growing, growing.open("w", encoding="utf-8") as file:
        file.writelines(pieces)


def write_whole(path: Path, content: str) -> None:
    """Write a text as `write_pieces` does."""
    write_pieces(path, [content])


def write_json(path: Path, content: Any) -> None:
    """Write a JSON value as `write_pieces` does."""
    write_pieces(path, [json.dumps(content, indent=2) + "\n"])


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON row per line as `write_pieces` does."""
    write_pieces(path, map(line_of, rows))


@contextlib.contextmanager
def line_writer(path: Path) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """Gives a function that writes a row as a line of JSON. The file is complete or absent."""
    with whole_file(path) as growing, growing.open("w", encoding="utf-8") as file:
        yield lambda row: file.write(line_of(row))


def line_of(row: Any) -> str:
    """A JSON value as a line, with its end."""
    return json.dumps(row) + "\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines that this package wrote.

    Raises `ValueError` if the file does not exist, or if a line is not a JSON object. The message names the
    line.
    """
    number = 0
    with reading(path, "a file of rows"), plain_file(path, "file").open("rb") as file:
        while line := file.readline(LARGEST_LINE):
            number += 1
            with reading(f"{path}:{number}", "JSON"):
                row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: not a JSON object but a {type(row).__name__}")
            yield row
