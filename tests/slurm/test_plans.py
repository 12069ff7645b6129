"""Every shipped script and launch plan is one that Slurm accepts, on a planned cluster of 2,048 x 8 H100s."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_post.launch import slurm
from megatron_post.launch.launch import planned_run
from megatron_post.launch.preflight import layout_findings
from tests.e2e.runs import ROOT
from tests.slurm.lab import PATH, Lab

H100 = str(ROOT / "configs" / "clusters" / "h100.yaml")
CONFIGS = sorted((ROOT / "configs").glob("llama3_*/[!b]*.yaml"))
SCRIPTS = sorted((ROOT / "launchers" / "slurm").glob("*.sbatch"))
BATCH_OF_ALL_NODES = ["train.global_batch=16384"]


@pytest.fixture(scope="module")
def planned(_slurm_is_here: None) -> Iterator[Lab]:
    cluster = Lab()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        patch.setenv("PATH", PATH)
        try:
            cluster.start_plan(2048)
            yield cluster
        finally:
            cluster.stop()


@pytest.mark.parametrize("nodes", [None, 256, 2048])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_launch_plans(planned: Lab, config: Path, nodes: int | None) -> None:
    """On the fewest nodes, on 256 and on all 2,048."""
    resolved, cluster, job = planned_run(str(config), H100, BATCH_OF_ALL_NODES, nodes=nodes)
    assert layout_findings(resolved, cluster, nodes=job.nodes) == []
    started = time.perf_counter()
    answer = slurm.test_only(job, cluster)
    seconds = time.perf_counter() - started
    # whole nodes, of 192 cores there
    assert f"using {192 * job.nodes} processors on nodes h100-" in answer
    assert seconds < 1, f"{seconds:.2f} s"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_by_hand(planned: Lab, script: Path) -> None:
    for nodes in (1, 2048):
        started = time.perf_counter()
        answer = planned("sbatch", "--test-only", f"--nodes={nodes}", str(script), "config.yaml")
        assert "to start at " in answer
        assert time.perf_counter() - started < 1


def test_one_node_too_many_is_refused(planned: Lab) -> None:
    """The planned cluster does refuse what does not fit."""
    _, cluster, job = planned_run(str(CONFIGS[-1]), H100, BATCH_OF_ALL_NODES, nodes=2049)
    with pytest.raises(slurm.SlurmError, match=r"Node count specification invalid"):
        slurm.test_only(job, cluster)
    _, cluster, job = planned_run(str(CONFIGS[-1]), H100, BATCH_OF_ALL_NODES, nodes=1)
    with pytest.raises(slurm.SlurmError, match=r"Requested node configuration is not available"):
        slurm.test_only(job, cluster.model_copy(update={"gpu_type": "a100"}))
