"""The jobs that were submitted for a run (`jobs.jsonl`) and their state by Slurm and their checkpoints."""

import contextlib
import json
import re
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_post.launch import slurm
from megatron_post.launch.script import Job, JobId, launch_folder
from megatron_post.storage.manifest import published_steps
from megatron_post.storage.reading import reading


@dataclass(frozen=True)
class SubmittedJob:
    """One line of the record."""

    job_id: JobId
    name: str
    log: Path
    run_dir: Path
    after: tuple[JobId, ...] = ()


def record_job(
    folders: Iterable[Path],
    job: Job,
    job_id: JobId,
    *,
    after: tuple[JobId, ...] = (),
    command: tuple[str, ...] | None = None,
    run_dir: str | None = None,
) -> SubmittedJob:
    """Add a job to the records in `folders`. command, run_dir: those of a task, if it has its own."""
    submitted = SubmittedJob(
        job_id,
        job.name,
        job.log_of(job_id),
        job.directory / (job.run_dir if run_dir is None else run_dir),
        after,
    )
    line = {
        "job_id": job_id,
        "name": job.name,
        "log": str(submitted.log),
        "run_dir": str(submitted.run_dir),
        "after": after,
        "command": job.command if command is None else command,
        "then": job.then,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "jobs.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    return submitted


def submitted_jobs(run_dir: str | Path) -> list[SubmittedJob]:
    """Jobs of a run, the oldest first. Raises `ValueError` if none was launched."""
    path = launch_folder(Path(run_dir)) / "jobs.jsonl"
    if not path.is_file():
        raise ValueError(f"nothing was launched for {run_dir}: {path} does not exist (RUN is a run_dir)")
    with reading(path, "the record of submitted jobs"):
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        if not lines:
            raise ValueError("it is empty")
        return [
            SubmittedJob(
                _job_id(d["job_id"]),
                str(d["name"]),
                Path(d["log"]),
                Path(d["run_dir"]),
                tuple(map(_job_id, d["after"])),
            )
            for d in lines
        ]


def status_rows(run_dir: str | Path) -> list[dict[str, str]]:
    """One row per job for printing: id, name, state, restarts, newest checkpoint, times, nodes and reason."""
    rows = []
    for job in submitted_jobs(run_dir):
        state = slurm.job_state(job.job_id)
        steps = published_steps(job.run_dir / "checkpoints")
        rows.append(
            {
                "job": str(job.job_id),
                "name": job.name,
                "state": state.state,
                "restarts": str(state.restarts),
                "checkpoint": str(steps[-1]) if steps else "-",
                "ran": state.time_used,
                "left": state.time_left,
                "nodes": state.nodes,
                "why": state.reason if state.state == "PENDING" else last_message(job.log) or state.reason,
            }
        )
    return rows


def last_message(log: Path) -> str:
    """The last message of the launcher's script in a log, without its time."""
    if not log.is_file():
        return ""
    messages = re.findall(r"^launch: \S+ (.*)$", tail(log, 200), re.MULTILINE)
    return messages[-1] if messages else ""


def tail(log: Path, lines: int) -> str:
    """The last lines of a log. Only the end of the file is read, because logs can be large."""
    with reading(log, "a log"), log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 400 * lines))
        text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def _job_id(value: Any) -> JobId:
    """Raises `ValueError` for what is no id, since ids are arguments of Slurm's commands."""
    return str(value) if re.fullmatch(r"\d+_\d+", str(value)) else int(value)


def _active_jobs(run_dir: str | Path) -> list[JobId]:
    """Ids of a run's jobs that have not ended, the last one of a chain first."""
    states = {job.job_id: slurm.job_state(job.job_id) for job in reversed(submitted_jobs(run_dir))}
    return [job for job, state in states.items() if not state.is_final and state.state != "UNKNOWN"]


def active_findings(run_dirs: Iterable[str]) -> list[str]:
    """Find runs that an earlier job still uses or will use. A second job would supersede that one."""
    found = []
    for run_dir in sorted(run_dirs):
        if not (launch_folder(Path(run_dir)) / "jobs.jsonl").is_file():
            continue
        with contextlib.suppress(slurm.SlurmError):  # `slurm_findings` reports that Slurm fails
            if jobs := _active_jobs(run_dir):
                found.append(
                    f"run_dir={run_dir}: job {', '.join(map(str, jobs))} is queued or running for it; choose "
                    f"another, or first: megatron-post launch cancel {shlex.quote(run_dir)}"
                )
    return found


def cancel_run(run_dir: str | Path) -> list[JobId]:
    """Cancel every job of a run that has not ended. Returns their ids, the last one of a chain first."""
    active = _active_jobs(run_dir)
    slurm.cancel(active)
    return active
