"""Variables that a job inherits must not change which rank its processes have. On a real Slurm."""

import sys
from pathlib import Path

import pytest

from megatron_post.launch import slurm
from megatron_post.launch.cluster import load_cluster
from megatron_post.launch.record import record_job
from megatron_post.launch.script import Job
from tests.slurm.conftest import ClusterFiles
from tests.slurm.lab import Lab

# The arguments $1 to $3 are `-m megatron_post train`.
RANK = f"""#!/bin/bash
[[ $FORGET != no ]] || export RANK=0 WORLD_SIZE=1
exec {sys.executable} -c 'import os
from megatron_post.parallel.environment import rank_from_environment
print("rank", *rank_from_environment(), os.environ["MASTER_ADDR"], flush=True)'
"""


def _run(lab: Lab, directory: Path, cluster_file: str) -> tuple[str, list[str]]:
    """The state and the log of a job of two nodes with two ranks each."""
    job = Job("job", ("train",), "run", directory, nodes=2)
    submitted = record_job([job.folder], job, slurm.submit(job, load_cluster(cluster_file)))
    state = lab.wait(submitted.job_id, "COMPLETED", "FAILED")
    return state, submitted.log.read_text().splitlines()


def test_enroots_hook_in_the_batch_container(
    lab: Lab, clusters: ClusterFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With RANK=0 and WORLD_SIZE=1 in the job script, the ranks are still Slurm's.

    If a rank itself has these variables, it refuses to train alone and names both worlds.
    """
    path = tmp_path / "rank.sh"
    path.write_text(RANK)
    path.chmod(0o755)
    hook = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "elsewhere", "PMI_SIZE": "1"}
    for name, value in hook.items():
        monkeypatch.setenv(name, value)
    state, log = _run(lab, tmp_path, clusters(python=str(path)))
    ranks = sorted(line.split()[1:] for line in log if line.startswith("rank "))
    assert state == "COMPLETED", log
    assert ranks == [[str(i), "4", str(i % 2), "127.0.0.1"] for i in range(4)]
    monkeypatch.setenv("FORGET", "no")
    state, log = _run(lab, tmp_path, clusters(python=str(path)))
    assert state == "FAILED", log
    assert any("SLURM_STEP_NUM_TASKS=4), but RANK=0 and WORLD_SIZE=1" in line for line in log), log
