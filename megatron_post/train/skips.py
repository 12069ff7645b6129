"""Records the packs that a run skips because a step was not finite. A resumed run skips them too."""

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
    """The run must go back to its newest checkpoint. The packs that it then skips have been recorded."""


@dataclass(frozen=True)
class Skip:
    """Packs [start, end) of the stream over all ranks. step: where they were found.

    places: what was found.
    """

    start: int
    end: int
    step: int
    places: list[str]


class Skips:
    """The skips of a run, in `run_dir/skipped.jsonl`. All ranks have them, and rank 0 writes the file.

    policy: "stop", "skip" or "rollback". most: the run stops after this many skips, whatever the policy.
    """

    def __init__(self, run_dir: str | Path, topology: Topology, *, policy: str, most: int) -> None:
        self._path, self._is_first = Path(run_dir) / "skipped.jsonl", topology.rank == 0
        self._policy, self._most = policy, most
        known: list[Any] = [self._read() if self._is_first else None]
        torch.distributed.broadcast_object_list(known, src=0)
        self._skips: list[Skip] = known[0]

    def covers(self, start: int, end: int) -> bool:
        """Whether any of the packs [start, end) is skipped. If so, the whole step is skipped."""
        return any(skip.start < end and start < skip.end for skip in self._skips)

    def decide(self, start: int, end: int, step: int, found: NotFinite) -> None:
        """Apply the policy to a step that was not finite. All ranks must call this method.

        Returns if the step is to be skipped. Raises `RollBack` if the run must go back to a checkpoint, and
        `FloatingPointError` if the run stops.
        """
        if self._policy == "stop":
            raise found
        if len(self._skips) >= self._most:
            raise FloatingPointError(f"{found}\n  train.max_skips={self._most} are used up") from found
        self._skips.append(Skip(start, end, step, found.places))
        if self._is_first:
            # The record must be on the disk before the run goes on. A run that is killed later would
            # otherwise take the step that this run skipped.
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(self._skips[-1])) + "\n")
                file.flush()
                os.fsync(file.fileno())
            say(f"{found}\nthese packs are skipped from now on ({self._policy})")
        if self._policy == "rollback":
            raise RollBack

    def _read(self) -> list[Skip]:
        if not self._path.exists():
            return []
        text = self._path.read_text()
        # A rest without a line end was being written when the run was killed, and was never acted upon.
        whole = text[: text.rfind("\n") + 1]
        os.truncate(self._path, len(whole.encode()))
        with reading(self._path, "a record of skipped packs"):
            return [Skip(**json.loads(line)) for line in whole.splitlines()]
