"""Runs of the real trainer that tests submit, watch and interrupt."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_post.launch.launch import launch_run
from megatron_post.launch.record import SubmittedJob, submitted_jobs
from megatron_post.storage.manifest import published_steps
from tests.slurm.lab import Lab, wait_until


@dataclass
class Run:
    """A submitted training run."""

    lab: Lab
    directory: Path
    job: SubmittedJob

    @property
    def number(self) -> int:
        return int(self.job.job_id)

    @property
    def log(self) -> str:
        return self.job.log.read_text() if self.job.log.is_file() else ""

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that it runs on, in the order of their ranks."""
        listed = self.lab("squeue", "-h", "-j", str(self.number), "-o", "%N")
        return self.lab("scontrol", "show", "hostnames", listed).split()

    def reaches(self, step: int, timeout: float = 400) -> None:
        """Wait until a running job has a checkpoint of `step` or later."""

        def reached() -> bool:
            state = self.lab.state(self.number)
            assert state not in ("FAILED", "COMPLETED", "CANCELLED"), self.log
            steps = published_steps(self.directory / "checkpoints")
            return state == "RUNNING" and max(steps, default=0) >= step

        wait_until(reached, timeout, lambda: self.log[-3000:])

    def resumed(self, times: int) -> None:
        """Wait until its ranks have resumed from a checkpoint for the `times`-th time."""
        is_there = "resumed after step"
        wait_until(lambda: self.log.count(is_there) >= times, 400, lambda: self.log[-3000:])

    def restarted(self, times: int) -> None:
        """Wait until Slurm has requeued it for the `times`-th time."""
        self.lab.restarted(self.number, times, lambda: self.log[-3000:])

    def weights(self, timeout: float = 600) -> dict[str, bytes]:
        """The exported weights, after the job has succeeded."""
        state = self.lab.wait(self.number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=timeout)
        assert state == "COMPLETED", self.log
        files = {file.name: file.read_bytes() for file in (self.directory / "hf").glob("*.safetensors")}
        assert files
        return files


def launch(lab: Lab, data: Path, name: str, cluster: str, *overrides: str) -> Run:
    """Launch the small run under another name on two nodes, as `megatron-post launch` does."""
    directory = data / name
    launch_run(str(data / "config.yaml"), cluster, [f"run_dir={directory}", *overrides], nodes=2, name=name)
    return Run(lab, directory, submitted_jobs(directory)[-1])


def preempt(lab: Lab, job: int) -> None:
    """Start a more urgent job for a second on the nodes of a job."""
    nodes = lab("squeue", "-h", "-j", str(job), "-o", "%N")
    options = ["-p", "urgent", "--exclusive", "-N2", "-w", nodes, "-o", "/dev/null"]
    lab("sbatch", *options, "--wrap", "sleep 1")


class MovedRun(NamedTuple):
    """A run that was preempted by a more urgent job and then lost a node."""

    run: Run
    lost_node: str


def preempted_and_a_node_lost(lab: Lab, data: Path, cluster: str) -> MovedRun:
    """A run that is preempted and loses a node. It is still running when this returns."""
    run = launch(lab, data, "moved", cluster)
    run.reaches(4)
    preempt(lab, run.number)
    run.restarted(1)
    run.resumed(1)
    lost = run.nodes[-1]
    lab.kill_node(lost)
    run.restarted(2)
    return MovedRun(run, lost)
