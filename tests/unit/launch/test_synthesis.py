"""`launch synthesize`: the jobs of clients and servers, and what is refused before they are queued."""

from pathlib import Path
from typing import Any

import pytest

from megatron_post.config.load import ConfigError
from megatron_post.launch.record import SubmittedJob, record_job, submitted_jobs
from megatron_post.launch.script import Job
from megatron_post.launch.synthesis import launch_synthesis
from tests.e2e.runs import ROOT
from tests.unit.synthesis.author import write_config, write_recipe, write_tasks
from tests.unit.synthesis.test_serving import served

H100 = str(ROOT / "configs" / "clusters" / "h100.yaml")


def _dry_run(
    directory: Path, capsys: pytest.CaptureFixture[str], *, cluster: str = H100, **options: Any
) -> list[str]:
    """The plan, the sbatch line and the command of each job, and at last the script of the first."""
    write_recipe(directory)
    write_tasks(directory / "tasks.jsonl", "right")
    serve = options.pop("serve", None)
    config = served(directory, **serve) if serve else write_config(directory, "http://localhost:8000/v1")
    launch_synthesis(str(config), cluster, (), dry_run=True, **options)
    return capsys.readouterr().out.split("# sbatch ")


def test_processes_are_an_array_that_takes_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, clients, script = _dry_run(tmp_path, capsys, processes=16, cpus=4)
    assert "# processes that share the input rows: 16," in plan
    line, command, _ = clients.split("\n", 2)
    assert command == f"#   megatron-post synthesize run {tmp_path}/run.yaml"
    assert "--array=0-15" in line and "%A_%a.log" in line and "--cpus-per-task=4" in line
    assert "--gpus-per-node" not in line and "--exclusive" not in line and "--requeue" in line
    assert f"command=(synthesize run {tmp_path}/run.yaml)" in script
    assert not (tmp_path / "output").exists()


def test_servers_are_another_array_with_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = {"model": "/models/405b", "command": None, "servers": 3, "nodes": 2}
    plan, servers, clients, ending, script = _dry_run(tmp_path, capsys, processes=2, serve=wanted)
    assert "# servers of /models/405b: 3, each on 2 x 8 GPUs" in plan
    assert "--array=0-2" in servers and "--nodes=2" in servers and "--gpus-per-node=8" in servers
    assert "--ntasks-per-node=1" in servers and "command=(synthesize serve " in script
    assert "--array=0-1" in clients and "megatron-post synthesize run " in clients
    assert "megatron-post synthesize end-servers " in ending and "--array" not in ending.split("\n")[0]


def test_a_partition_without_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"base: {H100}\npartition: gpu\ncpu_partition: cpu\n")
    wanted = {"model": "m", "command": None}
    _, servers, clients, ending, _ = _dry_run(tmp_path, capsys, cluster=str(cluster), serve=wanted)
    assert "--partition=gpu" in servers and "--partition=cpu" in clients and "--partition=cpu" in ending


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus": 10_000}, "--cpus 10000 is more than cpus_per_node="),
        (
            {"serve": {"gpus": 16, "command": None}},
            "serve.gpus=16 is more than the cluster's gpus_per_node=8",
        ),
        (
            {"serve": {"image": "vllm.sqsh"}},
            "serve.image has no effect, because the cluster file has no container",
        ),
    ],
)
def test_what_the_cluster_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"base: {H100}\ncontainer: null\n")
    with pytest.raises(ConfigError, match=message):
        _dry_run(tmp_path, capsys, cluster=str(cluster), **options)


def test_tasks_of_an_array_are_recorded(tmp_path: Path) -> None:
    job = Job("name", ("synthesize", "run"), "out", tmp_path, array=2)
    for task in ("12_0", "12_1"):
        record_job([job.folder], job, task, after=(7, "9_0"))
    first, second = submitted_jobs(tmp_path / "out")
    log = tmp_path / "out/slurm/name-12_1.log"
    assert second == SubmittedJob("12_1", "name", log, tmp_path / "out", (7, "9_0"))
    assert first.job_id == "12_0"
