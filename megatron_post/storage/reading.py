"""Reads files that other programs or users wrote. Every fault becomes a `ValueError` that names the file."""

import contextlib
import csv
import difflib
import json
import os
import pickle
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

# Bytes. The largest JSON file in use is a tokenizer of 256,000 tokens, with 35 million bytes.
LARGEST_JSON = 256 * 2**20
LARGEST_LINE = 64 * 2**20  # bytes of a line of JSON

# The errors that invalid bytes and values cause, in this package and in libraries.
_SYMPTOMS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError, EOFError, RuntimeError,
    MemoryError, csv.Error, zlib.error, struct.error, pickle.UnpicklingError, yaml.YAMLError,
)  # fmt: skip


@contextlib.contextmanager
def reading(path: str | Path, expected: str = "") -> Iterator[None]:
    """Within this context an error that a file's content causes becomes a `ValueError` that names the file.

    expected: what the file should be, such as "the config of a Llama". The context should contain the parsing
    only, because a mistake in other code would look like a fault of the file. An error of this package that
    already names the file is not changed.
    """
    try:
        yield
    except _SYMPTOMS as error:
        is_own = type(error) is ValueError or type(error).__module__.startswith("megatron_post")
        if is_own and str(path) in str(error):
            raise
        if isinstance(error, ValueError) and hasattr(error, "errors"):  # pydantic has one error per key
            keys = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise ValueError(f"{path}: {'; '.join(keys)}") from error
        wrong = f"not {expected}" if expected else "cannot be read"
        raise ValueError(f"{path}: {wrong}: {_reason(error)}") from error


def plain_file(path: Path, what: str) -> Path:
    """Return `path` if it is a regular file or a link to one, and raise `ValueError` otherwise.

    Opening a pipe would wait forever. what: the start of the message, such as "config file".
    """
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{what} {path} is a directory; name a file in it")
    if os.path.lexists(path):
        raise ValueError(f"{what} {path} is not a regular file, or is a link that does not lead to one")
    raise ValueError(f"{what} {path} does not exist{did_you_mean_path(path)}")


def plain_files(directory: Path, *, unseen: str = "") -> None:
    """Raises `ValueError` unless everything below a directory is a regular file or a directory.

    unseen: directories below a directory of this name are not checked.
    """
    for folder, directories, files in os.walk(directory):
        if Path(folder).name == unseen:
            directories.clear()
        for name in files:
            plain_file(Path(folder, name), "file")


def read_json(path: Path, expected: str) -> Any:
    """The value in a JSON file. Raises `ValueError` with the file's name."""
    with reading(path, expected):
        size = plain_file(path, "file").stat().st_size
        if size > LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes, and no more than {LARGEST_JSON:,} are read")
        return json.loads(path.read_bytes())


def read_object(path: Path, expected: str) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError` like `read_json`, or if the value is not an object."""
    value = read_json(path, expected)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not {expected}: it holds a {type(value).__name__} and no object")
    return value


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)` for the most similar known name. Empty if no known name is similar."""
    found = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def did_you_mean_path(path: Path) -> str:
    """Like `did_you_mean`, for a path that does not exist and the names in its directory."""
    with contextlib.suppress(OSError, ValueError):
        found = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
        return f" (did you mean {path.with_name(found[0])}?)" if found else ""
    return ""


def _reason(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OSError):
        text = error.strerror or text
    elif isinstance(error, RecursionError):
        text = "nested too deeply"
    elif isinstance(error, MemoryError):
        text = f"this machine has not enough memory for it {text}".rstrip()
    return text if text and type(error) is ValueError else f"{type(error).__name__}: {text}"
