"""Packs that a run passes over, because a step on them was not finite: written down, so that a resumed run
passes over them too."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_post.display import say
from megatron_post.parallel.topology import Topology
from megatron_post.storage.reading import reading
from megatron_post.train.health import NotFinite


class RollBack(Exception):
    """The run must go back to its newest checkpoint; what it then passes over is written down."""


@dataclass(frozen=True)
class Skip:
    """Packs [start, end) of the stream, over all ranks; the step they were found in; where and what."""

    start: int
    end: int
    step: int
    places: list[str]


class Skips:
    """The skips of a run, in `run_dir/skipped.jsonl`. All ranks hold them; the first writes.

    policy: "stop", "skip" or "rollback"; most: skips after which a run stops, whatever the policy.
    """

    def __init__(self, run_dir: str | Path, topology: Topology, *, policy: str, most: int) -> None:
        self._path, self._is_first = Path(run_dir) / "skipped.jsonl", topology.rank == 0
        self._policy, self._most = policy, most
        known: list[Any] = [self._read() if self._is_first else None]
        torch.distributed.broadcast_object_list(known, src=0)
        self._skips: list[Skip] = known[0]

    def covers(self, start: int, end: int) -> bool:
        """Whether packs [start, end) hold any that are passed over; a step is passed over whole."""
        return any(skip.start < end and start < skip.end for skip in self._skips)

    def decide(self, start: int, end: int, step: int, found: NotFinite) -> None:
        """Do what the policy says about a step that was not finite: return to pass over it, or raise
        `RollBack`, or `found`, if the run stops. All ranks call it."""
        if self._policy == "stop":
            raise found
        if len(self._skips) >= self._most:
            raise FloatingPointError(f"{found}\n  train.max_skips={self._most} are used up") from found
        self._skips.append(Skip(start, end, step, found.places))
        if self._is_first:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(self._skips[-1])) + "\n")
                file.flush()
                os.fsync(file.fileno())
            say(f"{found}\npassed over from now on ({self._policy})")
        if self._policy == "rollback":
            raise RollBack

    def _read(self) -> list[Skip]:
        if not self._path.exists():
            return []
        text = self._path.read_text()
        # what follows the last line's end was being written when the run died, and nothing followed from it
        whole = text[: text.rfind("\n") + 1]
        os.truncate(self._path, len(whole.encode()))
        with reading(self._path, "a record of skipped packs"):
            return [Skip(**json.loads(line)) for line in whole.splitlines()]
