"""Hangs: every rank watches its own steps, and tells where it stands once one takes too long.

Nothing is written and nobody is asked while steps are in time. A rank whose step is half-way to the deadline
leaves a note of where it is; at the deadline all ranks dump their stacks, and the ranks without a note, or
behind the others, are named. Then every rank ends with `REQUEUE`, and those of the same host that do not
answer are killed.
No collective takes part, for a collective is what hangs.
"""

import contextlib
import faulthandler
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import torch

from megatron_post.display import say
from megatron_post.parallel.topology import Topology
from megatron_post.train.pulse import Period, Pulse
from megatron_post.train.signals import REQUEUE

TICK = 0.25  # seconds between looks at the own pulse
# Seconds from the deadline to the end: for other ranks to notice and dump, before anybody is judged.
NOTICE = 2.5


class Watchdog:
    """Within this context a step that takes longer than `deadline` seconds ends all ranks of the run.

    directory: for notes, stacks and report, of this incarnation alone. deadline 0: no watching.
    """

    def __init__(self, directory: Path, topology: Topology, pulse: Pulse, *, deadline: float) -> None:
        self.directory, self._pulse, self._deadline = directory, pulse, deadline
        self._rank, self._over, self._ends = topology.rank, threading.Event(), threading.Lock()
        self._places: list[Any] = [None] * topology.world_size  # (host, process id) of every rank
        torch.distributed.all_gather_object(self._places, (socket.gethostname(), os.getpid()))

    def __enter__(self) -> Self:
        if self._deadline:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and (self.directory / "hung").exists():
            # other ranks end, and what that cuts off here is no failure of its own
            self._end()
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        self._note(self._rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        suspended = 0.0
        seen, period = time.monotonic(), self._pulse.period
        while not self._over.wait(TICK):
            now = time.monotonic()
            if self._pulse.period is not period:
                suspended, period = 0.0, self._pulse.period
            # this process did not run, so it has not been waiting for anybody either
            suspended += max(0.0, now - seen - 20 * TICK)
            seen = now
            # for a thread that never lets the others run, and so this one neither
            faulthandler.dump_traceback_later(self._deadline + 4, exit=True)
            if period is None:
                continue
            share = (now - period.since - suspended) / (self._deadline * period.patience)
            if share > 0.5:
                self._leave_note(period)
            if share > 1 or (share > 0.5 and (self.directory / "hung").exists()):
                self._end()

    def _leave_note(self, period: Period) -> None:
        content = {"step": period.step, "section": period.section}
        fresh = self.directory / f".note-{self._rank}"
        with contextlib.suppress(OSError):  # a full disk must not end the watch
            self.directory.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(content))
            fresh.rename(self._note(self._rank))

    def _note(self, rank: int) -> Path:
        return self.directory / f"rank-{rank}.json"

    def _end(self) -> None:
        self._ends.acquire()  # for ever: who comes second ends with the first
        try:
            try:
                (self.directory / "hung").touch()
                with (self.directory / f"rank-{self._rank}.txt").open("w") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
            except OSError:  # a full disk
                faulthandler.dump_traceback(all_threads=True)
            time.sleep(NOTICE)
            notes = {rank: self._read(rank) for rank in range(len(self._places))}
            silent = [rank for rank, note in notes.items() if note is None and rank != self._rank]
            answering = [rank for rank in notes if rank not in silent]
            # a rank that wakes later finds only its own kind silent: the first verdict stands
            if self._rank == min(answering) and not (self.directory / "report.txt").exists():
                text = f"hang: step not done within {self._deadline:g} s\n" + "\n".join(verdict(notes))
                text += f"\nstacks of all ranks that answer: {self.directory}/rank-*.txt"
                say(text, file=sys.stderr)
                with contextlib.suppress(OSError):
                    (self.directory / "report.txt").write_text(text + "\n")
            host = self._places[self._rank][0]
            stuck = [str(self._places[rank][1]) for rank in silent if self._places[rank][0] == host]
            if stuck and self._note(self._rank).exists():
                # a stopped process cannot end itself. Later than this one, whose status a launcher shall see
                # first; by a shell, for this process will be gone
                command = f"sleep 1; kill -KILL {' '.join(stuck)} 2>/dev/null"
                subprocess.Popen(["sh", "-c", command], start_new_session=True)
        finally:
            os._exit(REQUEUE)

    def _read(self, rank: int) -> dict[str, Any] | None:
        """A rank's note, if it is not seconds older than this rank's own, by the file system's clock: those
        of hosts differ and jump."""
        try:
            note: dict[str, Any] = json.loads(self._note(rank).read_text())
            behind = self._note(self._rank).stat().st_mtime - self._note(rank).stat().st_mtime
        except (OSError, ValueError):
            return None
        return note if behind < NOTICE else None


def verdict(notes: dict[int, dict[str, Any] | None]) -> list[str]:
    """Who did not arrive, by rank: those without a note, and those behind; where all others wait."""
    silent = [rank for rank, note in notes.items() if note is None]
    lines = [f"  rank {rank} does not answer: stopped, dead or cut off" for rank in silent]
    places: dict[tuple[int, str], list[int]] = {}
    for rank, note in notes.items():
        if note is not None:
            places.setdefault((note["step"], note["section"]), []).append(rank)
    # the crowd waits; whoever is elsewhere is waited for
    crowd = max(places.values(), key=len, default=[])
    for (step, section), ranks in sorted(places.items()):
        which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_runs(ranks)}"
        what = "waiting" if ranks is crowd else "did not arrive:"
        lines.append(f"  {which} {what} in step {step}, {section}")
    if not silent and len(places) == 1:
        lines.append("  no rank is missing: a link or a device hangs, or train.step_deadline is too short")
    return lines


def _runs(ranks: list[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank, rank])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
