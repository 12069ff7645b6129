"""The GPU-hours of a chain's steps, by the planner where it knows them, and how many of them are idle."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_post.config.chain import ChainTask
from megatron_post.config.load import ConfigError, load_config
from megatron_post.config.schema import Config
from megatron_post.launch.allocation import ChainedJob
from megatron_post.plan.estimate import make_plan
from megatron_post.plan.hardware import gpu
from megatron_post.plan.outlook import Outlook

_PLANNER, _LIMIT = "planner", "time limit"


@dataclasses.dataclass(frozen=True)
class StepHours:
    """What a step costs.

    gpus, idle: allocated GPUs, and those of them that no rank uses. An array has those of all its tasks.
    hours: by the planner, or the time limit if the planner does not know the step, of the longest task.
    gpu_hours, idle_hours: of all GPUs, and of the idle ones.
    """

    name: str
    partition: str
    gpus: int
    idle: int
    hours: float
    gpu_hours: float
    idle_hours: float
    source: str


def step_hours(jobs: Sequence[ChainedJob], directory: Path) -> list[StepHours]:
    """The costs of each job's steps, in the order of the jobs. Steps that share a job are one row."""
    rows = []
    for job in jobs:
        tasks = job.steps[0].commands
        planned = [_planned_hours(task, job, directory) for task in tasks]
        limit = job.cluster.seconds / 3600
        hours = [limit if each is None else each for each in planned]
        rows.append(
            StepHours(
                name=job.job.name,
                partition=job.cluster.partition or "-",
                gpus=job.gpus * len(tasks),
                idle=job.idle_gpus * len(tasks),
                hours=max(hours),
                gpu_hours=job.gpus * sum(hours),
                idle_hours=job.idle_gpus * sum(hours),
                source=_LIMIT if None in planned else _PLANNER,
            )
        )
    return rows


def hours_table(rows: Sequence[StepHours]) -> list[str]:
    """Lines of a table for printing, and a line with the sums."""
    cells = [("job", "partition", "GPUs", "idle", "hours", "GPU-hours", "by")]
    cells += [
        (
            row.name,
            row.partition,
            str(row.gpus),
            str(row.idle),
            f"{row.hours:,.1f}",
            f"{row.gpu_hours:,.0f}",
            row.source,
        )
        for row in rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in cells]
    known, limits = (sum(r.gpu_hours for r in rows if r.source == by) for by in (_PLANNER, _LIMIT))
    idle = sum(row.idle_hours for row in rows)
    total = f"{known:,.0f} GPU-hours by the planner, and at most {limits:,.0f} by time limits"
    if idle:
        total += f". Up to {idle:,.0f} of them are idle, on GPUs that a job allocates and no rank uses"
    return [*map(str.rstrip, lines), total]


def task_config(task: ChainTask, directory: Path) -> Config | None:
    """The config of a training step, or that of a similar run while the step's own does not exist.

    None for other commands, and if nothing is known. Raises `ConfigError`.
    """
    command, *arguments = task.command
    if command != "train" or not arguments:
        return None
    if (directory / arguments[0]).is_file():
        return load_config(directory / arguments[0], arguments[1:])
    return task.like


def _planned_hours(task: ChainTask, job: ChainedJob, directory: Path) -> float | None:
    cluster = job.cluster
    ranks = job.job.ranks_per_node or cluster.ranks
    if not job.gpus or cluster.gpu is None or not job.gpus_per_rank:
        return None
    try:
        config = task_config(task, directory)
        if config is None:
            return None
        device = dataclasses.replace(gpu(cluster.gpu), per_node=ranks)
        plan = make_plan(config, gpus=job.job.nodes * ranks, gpu=device)
    except ConfigError:  # the findings say why the step cannot run
        return None
    return Outlook(plan, time_limit=cluster.seconds).hours
