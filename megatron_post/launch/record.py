"""What was submitted for a run, and how it stands: `jobs.jsonl`, Slurm's word, the checkpoints."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_post.launch import slurm
from megatron_post.launch.script import Job, launch_folder
from megatron_post.train.manifest import published_steps


@dataclass(frozen=True)
class Submitted:
    """One line of the record."""

    job_id: int
    name: str
    log: Path
    run_dir: Path
    after: tuple[int, ...] = ()


def remember(folder: Path, job: Job, job_id: int, *, after: tuple[int, ...] = ()) -> Submitted:
    """Add a job to the record in `folder`."""
    submitted = Submitted(
        job_id,
        job.name,
        job.log.with_name(job.log.name.replace("%j", str(job_id))),
        job.directory / job.run_dir,
        after,
    )
    line = {
        "job_id": job_id,
        "name": job.name,
        "log": str(submitted.log),
        "run_dir": str(submitted.run_dir),
        "after": after,
        "command": job.command,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "jobs.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return submitted


def submitted_jobs(run_dir: str | Path) -> list[Submitted]:
    """Jobs of a run, oldest first. Raises `ValueError` where none was launched."""
    path = launch_folder(Path(run_dir)) / "jobs.jsonl"
    if not path.is_file():
        raise ValueError(f"nothing was launched for {run_dir}: {path} does not exist (RUN is a run_dir)")
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    return [
        Submitted(d["job_id"], d["name"], Path(d["log"]), Path(d["run_dir"]), tuple(d["after"]))
        for d in lines
    ]


def status_rows(run_dir: str | Path) -> list[dict[str, str]]:
    """One row a job for a reader: id, name, state, restarts, newest checkpoint, times, nodes, why."""
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
                "why": state.reason if state.state == "PENDING" else last_word(job.log) or state.reason,
            }
        )
    return rows


def last_word(log: Path) -> str:
    """What the launcher's script said last in a log, without its time."""
    if not log.is_file():
        return ""
    said = re.findall(r"^launch: \S+ (.*)$", tail(log, 200), re.MULTILINE)
    return said[-1] if said else ""


def tail(log: Path, lines: int) -> str:
    """The last lines of a log, read from its end."""
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 400 * lines))
        text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def cancel_run(run_dir: str | Path) -> list[int]:
    """Cancel every job of a run that has not ended. Returns their ids, last of a chain first."""
    active = [
        job.job_id
        for job in reversed(submitted_jobs(run_dir))
        if not (state := slurm.job_state(job.job_id)).is_final and state.state != "UNKNOWN"
    ]
    slurm.cancel(active)
    return active
