"""Real runs on a real Slurm, 2 nodes x 2 ranks. However they are interrupted, they end in the same bytes.

The trainer is disturbed here, train.sbatch's own decisions are tested in test_script.py.
"""

import re
from pathlib import Path

from tests.slurm.conftest import ClusterFiles
from tests.slurm.lab import Lab
from tests.slurm.runs import Run, launch, preempt


def test_preempted_requeued_and_a_node_lost(
    lab: Lab, data: Path, clusters: ClusterFiles, whole: Run, limited: Run
) -> None:
    """One run, one after the other: preempted by a more urgent job, requeued by hand, a node powered off."""
    run = launch(lab, data, "moved", clusters(partition="spot"))
    run.reaches(4)
    preempt(lab, run)
    run.restarted(1)
    run.reaches(8)
    lab("scontrol", "requeue", str(run.number))
    run.restarted(2)
    run.reaches(14)
    lost = run.nodes[-1]
    lab.kill_node(lost)
    run.restarted(3)
    assert run.weights() == whole.weights()
    assert len(re.findall(r"resumed after step \d+", run.log)) == 3, run.log
    assert "Slurm sent USR1" in run.log and "node lost" in run.log
    assert lost not in run.nodes


def test_time_limit(lab: Lab, whole: Run, limited: Run) -> None:
    """A limit of a minute, of which Slurm tells ahead; then one that is long enough."""
    limited.restarted(1)
    lab("scontrol", "update", f"JobId={limited.number}", "TimeLimit=60")
    assert limited.weights() == whole.weights()
    assert "Slurm sent USR1" in limited.log and "requeued after checkpoint" in limited.log


def test_uninterrupted(lab: Lab, whole: Run) -> None:
    whole.weights()
    assert "node check:" in whole.log and "FAULT" not in whole.log
    assert "sft on TP2 x DP2" in whole.log and whole.log.rstrip().endswith("done")
    assert lab.restarts(whole.number) == 0
