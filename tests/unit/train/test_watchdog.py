"""The watchdog ends a hang and names the missing ranks. It ends its own process, so real ones are used."""

import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_post.config.sections import Parallel
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.heartbeat import Heartbeat
from megatron_post.train.signals import REQUEUE
from megatron_post.train.watchdog import Watchdog, verdict

_HANG = """
import sys, time
from pathlib import Path
import torch
from megatron_post.config.sections import Parallel
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.heartbeat import Heartbeat
from megatron_post.train.watchdog import Watchdog

def load_forever():
    time.sleep(120)

with parallel_run(Parallel(), seed=1) as topology:
    heartbeat = Heartbeat(topology.device)
    with Watchdog(Path(sys.argv[1]), topology, heartbeat, deadline=2.0):
        for step in range(3):
            heartbeat.begin(step, "data")
            time.sleep(1.0)
        print("steps in time", flush=True)
        heartbeat.begin(3, "data")
        load_forever()
"""


def test_a_hang_ends_with_its_stack(tmp_path: Path) -> None:
    """Three steps of 1 s meet a deadline of 2 s. The fourth hangs, and ends within the deadline plus 5 s."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HANG, str(tmp_path / "watch")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "steps in time\n", process.stderr.read()
    began = time.monotonic()
    assert process.wait(timeout=30) == REQUEUE
    assert time.monotonic() - began < 2 + 5
    assert "load_forever" in (tmp_path / "watch" / "rank-0.txt").read_text()
    assert "rank 0 waiting in step 3, data" in process.stderr.read()


def test_an_error_that_a_hang_elsewhere_causes_ends_as_a_hang(tmp_path: Path) -> None:
    """Rank 0's watchdog has ended rank 0. A collective here fails before this rank notices the hang."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "hung").touch()
    script = _HANG.replace(
        "for step in range(3):", "raise RuntimeError('connection reset')\n        for _ in ():"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "watch")], capture_output=True)
    assert done.returncode == REQUEUE, done.stderr


def test_verdict_names_the_silent_and_those_behind() -> None:
    waiting = {"step": 7, "section": "reduce gradients"}
    notes = {rank: dict(waiting) for rank in range(6)} | {6: None, 7: {"step": 7, "section": "data"}}
    assert verdict(notes) == [
        "  rank 6 does not answer: stopped, dead or cut off",
        "  rank 7 did not arrive: in step 7, data",
        "  ranks 0-5 waiting in step 7, reduce gradients",
    ]


def test_verdict_if_no_rank_is_missing() -> None:
    notes = {rank: {"step": 7, "section": "forward and backward"} for rank in range(2)}
    assert verdict(notes) == [
        "  ranks 0-1 waiting in step 7, forward and backward",
        "  no rank is missing: a link or a device hangs, or train.step_deadline is too short",
    ]


def test_the_age_of_a_note_is_taken_from_the_file_system(tmp_path: Path) -> None:
    """The clocks of two hosts may differ by an hour. Only the difference of two notes' file times counts."""
    with parallel_run(Parallel(), seed=1) as topology:
        watchdog = Watchdog(tmp_path, topology, Heartbeat(topology.device), deadline=4)
    for rank, written in ((0, 5000.0), (1, 4999.0), (2, 4997.0)):
        (tmp_path / f"rank-{rank}.json").write_text('{"step": 7, "section": "data"}')
        os.utime(tmp_path / f"rank-{rank}.json", (written, written))
    assert [watchdog._read(rank) is not None for rank in range(4)] == [True, True, False, False]
