"""Real runs on a real Slurm, 2 nodes x 2 ranks, end in the same bytes however they are interrupted.

These tests interrupt the trainer. The decisions of train.sbatch are tested in test_script.py.
"""

import re
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.slurm.conftest import ClusterFiles
from tests.slurm.lab import Lab, wait_until
from tests.slurm.runs import MovedRun, Run, launch


def test_preempted_and_a_node_lost(moved: Future[MovedRun], whole: Run) -> None:
    """One run is first preempted by a more urgent job, and then loses a node."""
    run, lost = moved.result()
    assert run.weights() == whole.weights()
    assert len(re.findall(r"resumed after step \d+", run.log)) == 2, run.log
    assert "Slurm sent USR1" in run.log and f"Node failure on {lost}" in run.log
    assert lost not in run.nodes


@pytest.mark.slow
def test_time_limit_and_requeued_by_hand(lab: Lab, data: Path, clusters: ClusterFiles, whole: Run) -> None:
    """The ranks leave when Slurm warns them before the limit. Then an operator requeues the job.

    The ranks are frozen until the limit is near, because Slurm checks it only twice a minute. The run
    continues with a longer limit.
    """
    run = launch(lab, data, "limited", clusters(warning_seconds=60))
    run.reaches(4)
    ranks = lab.freeze(run.number)
    minutes, seconds = map(int, lab("squeue", "-h", "-j", str(run.number), "-o", "%M").split(":"))
    near = -(-(60 * minutes + seconds + 35) // 60)
    lab("scontrol", "update", f"JobId={run.number}", f"TimeLimit={near}")
    wait_until(lambda: "Slurm sent USR1" in run.log, 60, lambda: run.log[-2000:])
    for process in ranks:
        process.resume()
    run.restarted(1)
    lab("scontrol", "update", f"JobId={run.number}", "TimeLimit=60")
    run.resumed(1)
    lab("scontrol", "requeue", str(run.number))
    run.restarted(2)
    assert run.weights() == whole.weights()
    assert "requeued after checkpoint" in run.log
    assert len(re.findall(r"resumed after step \d+", run.log)) == 2, run.log


def test_uninterrupted(lab: Lab, whole: Run) -> None:
    whole.weights()
    assert "node check:" in whole.log and "FAULT" not in whole.log
    assert "sft on TP2 x DP2" in whole.log and whole.log.rstrip().endswith("done")
    assert lab.restarts(whole.number) == 0
