"""Output of JSON lines that a later call of the same command continues. Only the reporter rank writes it."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_post.parallel.topology import Topology
from megatron_post.storage.files import full_disk_explained, line_of, write_json
from megatron_post.storage.reading import plain_file, read_object, reading

T = TypeVar("T")


def lines_done(output: Path, origin: Mapping[str, str], *, key: str) -> int:
    """The number of complete lines in an output of this origin. An incomplete line of a crash is removed.

    origin: identifies everything that the lines depend on. `OUTPUT.origin.json` keeps it. key: of each line,
    such as "scores". Raises `ValueError` for an output of another origin, and for a file of other lines.
    """
    sidecar = output.with_name(f"{output.name}.origin.json")
    if not output.exists():
        write_json(sidecar, origin)
        with full_disk_explained(output):
            output.touch()
        return 0
    try:
        with reading(output, key):
            found = read_object(sidecar, f"the origin of {key}")
            content = plain_file(output, key).read_bytes()
            complete = content.rfind(b"\n") + 1
            done = sum(1 for line in content[:complete].splitlines() if json.loads(line)[key])
    except ValueError as error:
        raise ValueError(f"{output} exists and holds no {key} ({error}); give another --output") from None
    other = [name for name in origin if found.get(name) != origin[name]]
    if other and not done:
        write_json(sidecar, origin)  # another call failed before its first line
    elif other:
        raise ValueError(
            f"{output} holds {done} lines with {key} of another {' and '.join(other)}; give another "
            "--output, or remove it"
        )
    # This comes after the check of the origin, so that no other file loses data.
    os.truncate(output, complete)
    return done


def append_lines(output: Path, lines: Iterable[Any]) -> None:
    """Append values as JSON lines. Raises `DiskFull`."""
    with full_disk_explained(output), output.open("a") as file:
        # One write, so that a crash seldom keeps a part of a batch.
        file.write("".join(map(line_of, lines)))


def from_reporter(value: T | None, topology: Topology) -> T:
    """The reporter's value, on all ranks. All ranks must call it, and the others may give None."""
    found: list[T | None] = [None] * topology.world_size
    torch.distributed.all_gather_object(found, value if topology.is_reporter else None)
    (of_reporter,) = (each for each in found if each is not None)
    return of_reporter
