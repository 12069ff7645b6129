"""Calls of Slurm's commands. No other module of the package runs them."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_post.launch.cluster import Cluster
from megatron_post.launch.script import Job, JobId, render, sbatch_options

# What jobs must have done before another starts: succeeded, begun, ended in any way.
When = Literal["afterok", "after", "afterany"]
# Columns of squeue have fixed widths, because a value may contain any separator.
_COLUMNS = {"State": 24, "RestartCnt": 12, "Reason": 80, "TimeUsed": 24, "TimeLeft": 24, "NodeList": 400}
FINAL_STATES = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
)  # fmt: skip


class SlurmError(ValueError):
    """Slurm refused a command or is not installed. The message contains the command and its output."""


@dataclass(frozen=True)
class JobState:
    """The state of a job. Times are in Slurm's notation. Fields that Slurm does not report are empty."""

    state: str
    restarts: int = 0
    reason: str = ""
    time_used: str = ""
    time_left: str = ""
    nodes: str = ""

    @property
    def is_final(self) -> bool:
        return self.state.split()[0] in FINAL_STATES


def submit(job: Job, cluster: Cluster, *, after: Sequence[JobId] = (), when: When = "afterok") -> int:
    """Queue a job that starts after all jobs in `after` have exited with status 0, or as `when` says.

    Returns its id, which for an array is that of the array.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    answer = _run(_sbatch(job, cluster, after=after, when=when), stdin=render(job, cluster))
    number = re.match(r"\d+", answer)
    if number is None:
        raise SlurmError(f"sbatch printed {answer!r} where a job id was expected")
    return int(number[0])


def test_only(job: Job, cluster: Cluster) -> str:
    """The output of `sbatch --test-only`. Raises `SlurmError` if Slurm would refuse the job."""
    return _run([*_sbatch(job, cluster), "--test-only"], stdin=render(job, cluster)).strip()


def submission(job: Job, cluster: Cluster, *, after: Sequence[JobId] = (), when: When = "afterok") -> str:
    """The command line of `submit` for printing. Its standard input is the script."""
    return shlex.join(_sbatch(job, cluster, after=after, when=when))


def job_state(job_id: JobId) -> JobState:
    """The state of a job by squeue or, if squeue has dropped the job, by accounting. Otherwise UNKNOWN."""
    layout = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    try:
        lines = _run(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", f"--Format={layout}"])
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        lines = ""
    if not lines.strip():
        return _accounted(job_id)
    values, start = {}, 0
    for name, width in _COLUMNS.items():
        values[name] = lines.splitlines()[0][start : start + width].strip()
        start += width
    return JobState(
        state=values["State"],
        restarts=int(values["RestartCnt"] or 0),
        reason=values["Reason"] if values["Reason"] != "None" else "",
        time_used=values["TimeUsed"],
        time_left=values["TimeLeft"],
        nodes=values["NodeList"],
    )


def cancel(job_ids: Sequence[JobId]) -> None:
    """Cancel jobs. A running job can save, because Slurm sends SIGTERM KillWait seconds before SIGKILL."""
    if job_ids:
        _run(["scancel", *map(str, job_ids)])


def _accounted(job_id: JobId) -> JobState:
    """The state of a job by sacct, if the cluster keeps accounting records."""
    try:
        text = _run(
            ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job_id}",
             "--format=State,Elapsed,NodeList"]
        )  # fmt: skip
    except SlurmError:
        return JobState("UNKNOWN", reason="Slurm has forgotten this job and keeps no accounting")
    if not text.strip():
        return JobState("UNKNOWN", reason="Slurm knows no such job")
    state, elapsed, nodes = text.splitlines()[-1].split("|")
    return JobState(state, time_used=elapsed, nodes=nodes)


def _sbatch(job: Job, cluster: Cluster, *, after: Sequence[JobId] = (), when: When = "afterok") -> list[str]:
    command = ["sbatch", "--parsable", *sbatch_options(job, cluster)]
    if after:
        # without kill-on-invalid-dep a job whose predecessor failed would wait for ever
        command += [f"--dependency={when}:{':'.join(map(str, after))}", "--kill-on-invalid-dep=yes"]
    return command


def _run(command: Sequence[str], *, stdin: str = "") -> str:
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]} is not on the PATH: run this on a machine that submits Slurm jobs")
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not finish within 120 s") from None
    if done.returncode:
        raise SlurmError(f"{shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    # `sbatch --test-only` prints its result on stderr
    return done.stdout or done.stderr
