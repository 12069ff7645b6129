"""One small cluster for all tests of this directory.

`make slurm-test` runs them. Otherwise, or without Slurm, they are skipped.
"""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT, small_run
from tests.slurm.lab import PATH, Lab, installed
from tests.slurm.runs import MovedRun, Run, launch, preempted_and_a_node_lost

NODES = 10


@pytest.fixture(scope="session", autouse=True)
def _slurm_is_here() -> None:
    if not os.environ.get("SLURM_TESTS"):
        pytest.skip("tests on a real Slurm are run by `make slurm-test`")
    if not installed():
        pytest.skip("SLURM IS NOT INSTALLED: apt-get install --no-install-recommends slurm-wlm munge")


@pytest.fixture(scope="session")
def lab(_slurm_is_here: None) -> Iterator[Lab]:
    """A running cluster. The Slurm commands of this process use it too."""
    cluster = Lab()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        patch.setenv("PATH", PATH)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
        try:
            cluster.start_nodes(NODES)
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, _slurm_is_here: None) -> Path:
    """A directory with rows, tokenizer, packed store and `config.yaml` of a run on TP 2 x DP 2."""
    directory = tmp_path_factory.mktemp("data")
    small_run(
        directory,
        parallel={"tensor": 2},
        train={"steps": 40, "global_batch": 4},
        checkpoint={"every": 2, "keep": 2},
    )
    return directory


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> "ClusterFiles":
    return ClusterFiles(tmp_path_factory.mktemp("clusters"))


@pytest.fixture(scope="session")
def whole(lab: Lab, data: Path, clusters: "ClusterFiles") -> Run:
    """The uninterrupted run. It trains while other tests wait."""
    return launch(lab, data, "whole", clusters(node_check=True))


@pytest.fixture(scope="session")
def moved(lab: Lab, data: Path, clusters: "ClusterFiles", whole: Run) -> Iterator["Future[MovedRun]"]:
    """The same run, which a thread interrupts while other tests wait."""
    pool = ThreadPoolExecutor(1)
    yield pool.submit(preempted_and_a_node_lost, lab, data, clusters(partition="spot"))
    pool.shutdown(wait=False)


class ClusterFiles:
    """`clusters(python=...)` writes a cluster file: configs/clusters/local.yaml with whole nodes and changes.

    Ranks run without torch's compiler, which these tests do not use. Importing it takes a fifth of a rank's
    start.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, **values: object) -> str:
        always = {"python": sys.executable, "exclusive": True, "node_check": False}
        values = {**always, "environment": {"TORCHDYNAMO_DISABLE": "1"}, **values}
        path = self.directory / f"{len(list(self.directory.iterdir()))}.yaml"
        lines = [f"base: {ROOT}/configs/clusters/local.yaml"]
        lines += [f"{name}: {json.dumps(value)}" for name, value in values.items()]
        path.write_text("\n".join(lines) + "\n")
        return str(path)
