"""A file of JSON lines in which a run writes down its steps, each once, however often the run is killed."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_post.display import say


class StepLines:
    """One file, which one process writes. No trouble with the disk ends the run: a line that cannot be
    written is left out, which is said once.

    may_write: asked before each line. A process that a newer incarnation of its run has replaced writes none.
    """

    def __init__(self, path: Path, *, may_write: Callable[[], bool] = lambda: True) -> None:
        self._path, self._may_write, self._has_warned = path, may_write, False

    def write(self, **values: Any) -> None:
        """Append a line; the whole of it, or nothing where the disk is full."""
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

    def cut_back(self, step: int) -> None:
        """Remove the lines of steps after `step`, which the run is about to take again, and what a kill or a
        full disk has left of a line."""
        try:
            if self._path.exists():
                self._cut_back(step)
        except OSError as error:
            self._warn(error)

    def _cut_back(self, step: int) -> None:
        content = self._path.read_bytes()
        lines = content.splitlines(keepends=True)
        kept = [line for line in lines if _belongs(line, step)]
        wanted = b"".join(kept)
        if kept and not wanted.endswith(b"\n"):
            wanted += b"\n"
        if content.startswith(wanted):
            os.truncate(self._path, len(wanted))  # needs no room, and is done at once
        else:
            beside = self._path.with_name(f".{self._path.name}.partial")
            beside.write_bytes(wanted)
            beside.replace(self._path)
        if removed := len(lines) - len(kept):
            say(f"{self._path}: {removed} line(s) removed, of steps after {step} or cut off by a kill")

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            with contextlib.suppress(OSError):
                say(f"{self._path} cannot be written, and lacks what follows until it can: {error.strerror}")


def _belongs(line: bytes, step: int) -> bool:
    """Whether a line can be read, and is of no later step."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    number = found.get("step") if isinstance(found, dict) else None
    return not isinstance(number, int) or number <= step
