"""A file of JSON lines about a run's steps. Each step is there once, however often the run is killed."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_post.display import say


class StepLines:
    """One file that one process writes. An error of the disk does not end the run.

    A line that cannot be written is left out, and one warning is printed. may_write: called before each line.
    It returns False in a process that a newer incarnation of the run has replaced.
    """

    def __init__(self, path: Path, *, may_write: Callable[[], bool] = lambda: True) -> None:
        self._path, self._may_write, self._has_warned = path, may_write, False

    def write(self, **values: Any) -> None:
        """Append a whole line, or nothing if the disk is full."""
        if not self._may_write():
            return
        line = (json.dumps(values) + "\n").encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                try:
                    written = 0
                    while written < len(line):
                        written += file.write(line[written:])
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            self._warn(error)

    def cut_back(self, step: int) -> dict[str, int]:
        """Remove the lines of steps after `step`, which the run is about to repeat.

        Incomplete lines, which a kill or a full disk leaves, are removed as well. Returns the largest step
        that the file had of each kind of line.
        """
        try:
            if self._path.exists():
                return self._cut_back(step)
        except OSError as error:
            self._warn(error)
        return {}

    def _cut_back(self, step: int) -> dict[str, int]:
        content = self._path.read_bytes()
        lines = content.splitlines(keepends=True)
        last: dict[str, int] = {}
        kept = []
        for line in lines:
            found = _kind_and_step(line)
            if found is None:
                continue
            kind, number = found
            last[kind] = max(number, last.get(kind, 0))
            if number <= step:
                kept.append(line)
        wanted = b"".join(kept)
        if kept and not wanted.endswith(b"\n"):
            wanted += b"\n"
        if content.startswith(wanted):
            os.truncate(self._path, len(wanted))  # this is atomic and works on a full disk
        else:
            beside = self._path.with_name(f".{self._path.name}.partial")
            beside.write_bytes(wanted)
            beside.replace(self._path)
        if removed := len(lines) - len(kept):
            say(
                f"{self._path}: removed {removed} line(s) that belong to steps after {step} or are incomplete"
            )
        return last

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            with contextlib.suppress(OSError):
                say(f"{self._path} cannot be written, and lacks what follows until it can: {error.strerror}")


def read_steps(path: Path, kind: str) -> list[dict[str, Any]]:
    """The values of every step in a file of `StepLines`, in their order. Incomplete lines are left out."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if (_kind_and_step(line) or ("", 0))[0] == kind]


def _kind_and_step(line: bytes) -> tuple[str, int] | None:
    """The kind of a line and its step, which is 0 for a line without one. None for an incomplete line."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    values = found if isinstance(found, dict) else {}
    step = values.get("step")
    return str(values.get("kind", "")), step if isinstance(step, int) else 0
