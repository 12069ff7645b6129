"""Files that others wrote. Whatever is wrong with one becomes a `ValueError` that names it."""

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

LARGEST_JSON = 256 * 2**20  # bytes; the largest that is read, a tokenizer of 256,000 tokens, has 35 million
LARGEST_LINE = 64 * 2**20  # bytes of a line of JSON

# what wrong bytes and wrong values lead to, in our own code and in that of libraries
_SYMPTOMS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError, EOFError, RuntimeError,
    MemoryError, csv.Error, zlib.error, struct.error, pickle.UnpicklingError, yaml.YAMLError,
)  # fmt: skip


@contextlib.contextmanager
def reading(path: str | Path, expected: str = "") -> Iterator[None]:
    """Raises a `ValueError` that names the file for whatever its bytes and values lead to.

    expected: what they should be, such as "the config of a Llama". Put it around parsing alone: a fault of
    ours would look like one of the file. An error of ours that names the file already stays as it is.
    """
    try:
        yield
    except _SYMPTOMS as error:
        ours = type(error) is ValueError or type(error).__module__.startswith("megatron_post")
        if ours and str(path) in str(error):
            raise
        if isinstance(error, ValueError) and hasattr(error, "errors"):  # pydantic's, one for each key
            keys = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise ValueError(f"{path}: {'; '.join(keys)}") from error
        wrong = f"not {expected}" if expected else "cannot be read"
        raise ValueError(f"{path}: {wrong}: {_reason(error)}") from error


def plain_file(path: Path, what: str) -> Path:
    """The path itself. Raises `ValueError` unless a plain file, or a link to one, is there: to open a pipe
    would wait for ever. what: begins the message, "config file"."""
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{what} {path} is a directory; name a file in it")
    if os.path.lexists(path):
        raise ValueError(f"{what} {path} is no plain file, or a link that leads to none")
    raise ValueError(f"{what} {path} does not exist{did_you_mean_path(path)}")


def plain_files(directory: Path, *, unseen: str = "") -> None:
    """Raises `ValueError` unless everything below a directory is a plain file, or a directory. unseen: what
    lies in directories below one of this name is not looked at."""
    for folder, directories, files in os.walk(directory):
        if Path(folder).name == unseen:
            directories.clear()
        for name in files:
            plain_file(Path(folder, name), "file")


def read_json(path: Path, expected: str) -> Any:
    """The value in a JSON file. Raises `ValueError` naming the file."""
    with reading(path, expected):
        size = plain_file(path, "file").stat().st_size
        if size > LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes, and no more than {LARGEST_JSON:,} are read")
        return json.loads(path.read_bytes())


def read_object(path: Path, expected: str) -> dict[str, Any]:
    """As `read_json`, of a file that holds a JSON object."""
    value = read_json(path, expected)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not {expected}: it holds a {type(value).__name__} and no object")
    return value


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)` for the known name that is most like this one; nothing where none is."""
    found = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def did_you_mean_path(path: Path) -> str:
    """As `did_you_mean`, of the names in the directory where a path that does not exist would be."""
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
