"""Detects hangs. Every rank watches its own steps, and reports its position if a step takes too long.

While steps are in time, the watchdog writes nothing and communicates with no other rank. When half of a
step's deadline has passed, a rank writes a note with its step and section. At the deadline all ranks dump
their stacks, and one rank reports the ranks that have no note or are behind the others. Then every rank exits
with `REQUEUE`. Ranks of the same host that do not answer are killed.

The ranks communicate by files. A collective cannot be used, because a collective is usually what hangs.

The library torch.distributed.elastic.timer of torch 2.13 was compared. Its server is part of torchrun's
agent, so a job that srun starts has none. It kills a worker whose timer has expired and logs the timer's
name. It dumps no stacks, and does not find the rank for which the others wait.
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
from megatron_post.train.heartbeat import Heartbeat, Period
from megatron_post.train.signals import REQUEUE

TICK = 0.25  # seconds between two checks of this rank's heartbeat
# Seconds from the deadline to the exit. Other ranks notice the hang and dump their stacks in this time,
# before the report says which ranks are missing.
NOTICE = 2.5


class Watchdog:
    """Within this context a step that takes longer than `deadline` seconds ends all ranks of the run.

    directory: for the notes, stacks and report of this incarnation alone. deadline: 0 turns the watchdog off.
    """

    def __init__(self, directory: Path, topology: Topology, heartbeat: Heartbeat, *, deadline: float) -> None:
        self.directory, self._heartbeat, self._deadline = directory, heartbeat, deadline
        self._rank, self._over, self._ends = topology.rank, threading.Event(), threading.Lock()
        self._places: list[Any] = [None] * topology.world_size  # (host, process id) of every rank
        torch.distributed.all_gather_object(self._places, (socket.gethostname(), os.getpid()))

    def __enter__(self) -> Self:
        if self._deadline:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and (self.directory / "hung").exists():
            # Other ranks have exited because of a hang. This error is a consequence, and no failure of its
            # own.
            self._end()
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        self._note(self._rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        suspended = 0.0
        seen, period = time.monotonic(), self._heartbeat.period
        while not self._over.wait(TICK):
            now = time.monotonic()
            if self._heartbeat.period is not period:
                suspended, period = 0.0, self._heartbeat.period
            # The whole process was suspended for this time, for example by SIGSTOP. It has not waited for
            # other ranks then, so the time does not count.
            suspended += max(0.0, now - seen - 20 * TICK)
            seen = now
            # If another thread holds the interpreter lock forever, this thread cannot run. faulthandler's own
            # C thread does not need the lock and ends the process.
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
        with contextlib.suppress(OSError):  # a full disk must not end the watchdog's thread
            self.directory.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(content))
            fresh.rename(self._note(self._rank))

    def _note(self, rank: int) -> Path:
        return self.directory / f"rank-{rank}.json"

    def _end(self) -> None:
        # The lock is never released. A second thread waits here until the first one ends the process.
        self._ends.acquire()
        try:
            try:
                (self.directory / "hung").touch()
                with (self.directory / f"rank-{self._rank}.txt").open("w") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
            except OSError:  # the disk is full, so the stacks go to stderr
                faulthandler.dump_traceback(all_threads=True)
            time.sleep(NOTICE)
            notes = {rank: self._read(rank) for rank in range(len(self._places))}
            silent = [rank for rank, note in notes.items() if note is None and rank != self._rank]
            answering = [rank for rank in notes if rank not in silent]
            # A suspended rank that wakes up later finds that the others do not answer, because they have
            # exited. It must not overwrite the first report.
            if self._rank == min(answering) and not (self.directory / "report.txt").exists():
                text = f"hang: step not done within {self._deadline:g} s\n" + "\n".join(verdict(notes))
                text += f"\nstacks of all ranks that answer: {self.directory}/rank-*.txt"
                say(text, file=sys.stderr)
                with contextlib.suppress(OSError):
                    (self.directory / "report.txt").write_text(text + "\n")
            host = self._places[self._rank][0]
            stuck = [str(self._places[rank][1]) for rank in silent if self._places[rank][0] == host]
            if stuck and self._note(self._rank).exists():
                # A suspended process cannot end itself. It is killed one second after this process exits, so
                # that the launcher sees the status REQUEUE first. A shell does this, since this process is
                # gone.
                command = f"sleep 1; kill -KILL {' '.join(stuck)} 2>/dev/null"
                subprocess.Popen(["sh", "-c", command], start_new_session=True)
        finally:
            os._exit(REQUEUE)

    def _read(self, rank: int) -> dict[str, Any] | None:
        """A rank's note, or None if there is none or it is `NOTICE` seconds older than this rank's own.

        Ages are compared by the clock of the file system, because the clocks of hosts differ.
        """
        try:
            note: dict[str, Any] = json.loads(self._note(rank).read_text())
            behind = self._note(self._rank).stat().st_mtime - self._note(rank).stat().st_mtime
        except (OSError, ValueError):
            return None
        return note if behind < NOTICE else None


def verdict(notes: dict[int, dict[str, Any] | None]) -> list[str]:
    """Lines that name the ranks without a note, the ranks that are behind, and where the others wait."""
    silent = [rank for rank, note in notes.items() if note is None]
    lines = [f"  rank {rank} does not answer: stopped, dead or cut off" for rank in silent]
    places: dict[tuple[int, str], list[int]] = {}
    for rank, note in notes.items():
        if note is not None:
            places.setdefault((note["step"], note["section"]), []).append(rank)
    # Most ranks wait at the same place. Ranks at other places are the ones that they wait for.
    most = max(places.values(), key=len, default=[])
    for (step, section), ranks in sorted(places.items()):
        which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_runs(ranks)}"
        what = "waiting" if ranks is most else "did not arrive:"
        lines.append(f"  {which} {what} in step {step}, {section}")
    if not silent and len(places) == 1:
        lines.append("  no rank is missing: a link or a device hangs, or train.step_deadline is too short")
    return lines


def _runs(ranks: list[int]) -> str:
    """Ranks as text: 0, 1, 2 and 5 become "0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank, rank])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
