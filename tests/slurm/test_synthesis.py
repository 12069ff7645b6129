"""A recipe on a real Slurm: two clients and two servers, one of which is killed: the rows of one process."""

from pathlib import Path

import psutil

from megatron_post.launch.record import cancel_run, submitted_jobs
from megatron_post.launch.synthesis import launch_synthesis
from tests.scripted_server import ScriptedServer
from tests.slurm.conftest import ClusterFiles
from tests.slurm.lab import Lab, wait_until
from tests.unit.synthesis.author import answer, write_recipe, write_tasks
from tests.unit.synthesis.conftest import Place
from tests.unit.synthesis.test_serving import served

MANNERS = ("right", "mended", "wrong", "prose") * 15


def test_a_server_that_is_killed_costs_no_row(lab: Lab, clusters: ClusterFiles, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    write_tasks(tmp_path / "tasks.jsonl", *MANNERS)
    with ScriptedServer(answer) as server:
        Place(tmp_path, server).run(output=str(tmp_path / "whole"))
    undisturbed = (tmp_path / "whole/rows.jsonl").read_bytes()
    config = served(tmp_path, seconds=0.5, servers=2, gpus=1)
    overrides = ["models.author.backend.parallel_requests=2", "rows_in_flight=8"]
    launch_synthesis(str(config), clusters(exclusive=False), overrides, processes=2, cpus=1)
    jobs = submitted_jobs(tmp_path / "output")
    assert [job.name.partition("-")[2] for job in jobs] == ["serve"] * 2 + ["run"] * 2 + ["end-servers"]

    def logs() -> str:
        return "\n".join(f"{job.log}:\n{job.log.read_text()[-2000:]}" for job in jobs if job.log.is_file())

    servers = tmp_path / "output/servers"
    wait_until(lambda: len(_answered(tmp_path)) == 2 and min(_answered(tmp_path).values()) >= 5, 120, logs)
    _kill(min(_answered(tmp_path)))
    for job in jobs[2:]:
        assert lab.wait(job.job_id, "COMPLETED", "FAILED", "CANCELLED", timeout=200) == "COMPLETED", logs()
    assert (tmp_path / "output/rows.jsonl").read_bytes() == undisturbed, logs()
    wait_until(lambda: not list(servers.glob("*.url")), 60, logs)
    cancel_run(tmp_path / "output")  # the killed server waits for its next start
    assert (servers / "key").read_text() not in logs()


def _answered(directory: Path) -> dict[int, int]:
    """How many requests each server has answered, by its port."""
    logs = directory.glob("log-*")
    return {int(log.name.partition("-")[2]): len(log.read_text().splitlines()) for log in logs}


def _kill(port: int) -> None:
    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "tests.scripted_server" in (process.info["cmdline"] or []) and str(port) in process.info["cmdline"]
    ]
    assert len(found) == 1
    found[0].kill()
