"""Check, print and submit the jobs of a chain."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_post.config.chain import Chain, ChainTask
from megatron_post.config.load import ConfigError
from megatron_post.launch import slurm
from megatron_post.launch.allocation import ChainedJob, chained_jobs
from megatron_post.launch.cluster import Cluster
from megatron_post.launch.gpu_hours import task_config
from megatron_post.launch.preflight import disk_findings, layout_findings, memory_findings
from megatron_post.launch.record import SubmittedJob, record_job
from megatron_post.launch.script import launch_folder
from megatron_post.storage.reading import did_you_mean


def command_findings(chain: Chain, program: Any) -> list[str]:
    """Find the steps whose commands do not exist or cannot have their arguments.

    program: the command line of megatron-post as a command of click, which parses the arguments and runs
    nothing.
    """
    return [
        f"step {step.name!r}: {shlex.join(task.command)}: {error}"
        for step in chain.steps
        for task in step.commands
        if (error := _usage_error(program, task.command)) is not None
    ]


def _usage_error(command: Any, arguments: Sequence[str]) -> str | None:
    if {"--help", "-h"} & set(arguments):  # parsing would print the help
        return None
    words = list(arguments)
    while hasattr(command, "commands"):
        while words and words[0].startswith("-"):
            del words[0]  # an option of the group, which is a switch
        default = getattr(command, "default", None)
        if words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        elif words and default is not None:
            command = command.commands[default]
        else:
            known = [name for name, each in command.commands.items() if not each.hidden]
            given = f"no command {words[0]!r}{did_you_mean(words[0], known)}" if words else "no command"
            return f"{given}; commands are {', '.join(sorted(known))}"
    try:
        command.make_context(command.name, words)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer has classes of its own that click does not share
            raise
        return str(error.format_message()).rstrip(".")
    return None


def chain_findings(
    chain: Chain, jobs: Sequence[ChainedJob], cluster: Cluster, directory: Path, *, disks: bool = True
) -> list[str]:
    """Find the steps that cannot run on this cluster.

    A node may not have the ranks of a step or their GPUs. The layout of a training step may be impossible,
    its memory may not suffice and, if `disks` is set, its disk may be too full.
    """
    by_step = {step.name: job for job in jobs for step in job.steps}
    found = []
    for step in chain.ordered():
        job = by_step[step.name]
        own = _node_findings(job, cluster) or [
            text for task in step.commands for text in _train_findings(task, job, directory, disks=disks)
        ]
        found += [f"step {step.name!r}: {text}" for text in own]
    return found


def _node_findings(job: ChainedJob, cluster: Cluster) -> list[str]:
    ranks = job.job.ranks_per_node or cluster.ranks
    if not job.gpus_per_rank:
        if ranks <= cluster.cpus_per_node:
            return []
        return [f"ranks_per_node={ranks} is more than cpus_per_node={cluster.cpus_per_node} of the cluster"]
    if ranks > cluster.ranks:
        return [f"ranks_per_node={ranks} is more than the cluster's {cluster.ranks}"]
    wanted = ranks * job.gpus_per_rank
    if cluster.gpus_per_node and wanted > cluster.gpus_per_node:
        return [
            f"ranks_per_node={ranks} with gpus_per_rank={job.gpus_per_rank} needs {wanted} GPUs of a node, "
            f"and the cluster has gpus_per_node={cluster.gpus_per_node}"
        ]
    return []


def _train_findings(task: ChainTask, job: ChainedJob, directory: Path, *, disks: bool) -> list[str]:
    try:
        config = task_config(task, directory)
    except ConfigError as error:
        return [str(error)]
    if config is None:
        return []
    ranks = job.job.ranks_per_node or job.cluster.ranks
    cluster = job.cluster.model_copy(update={"ranks_per_node": ranks})
    found = layout_findings(config, cluster, nodes=job.job.nodes)
    found = found or memory_findings(config, cluster, nodes=job.job.nodes)
    if disks:
        run_dir = task.run_dir or config.run_dir
        found += disk_findings(config.model_copy(update={"run_dir": run_dir}), directory)
    return found


def job_table(jobs: Sequence[ChainedJob]) -> list[str]:
    """Lines of a table for printing: each step with its nodes x ranks, its predecessors and its command."""
    rows = [("step", "nodes x ranks", "after", "command")]
    rows += [
        (
            step.name + (f"[{number}]" if step.tasks else ""),
            f"{job.job.nodes} x {job.job.ranks_per_node or job.cluster.ranks}",
            (", ".join(step.after) or "-") + (" (same job)" if step is not job.steps[0] else ""),
            shlex.join(task.command),
        )
        for job in jobs
        for step in job.steps
        for number, task in enumerate(step.commands)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in rows]
    arrays = " [n] is task n of an array." if any(job.job.tasks for job in jobs) else ""
    steps = sum(len(job.steps) for job in jobs)
    return [
        f"{len(jobs)} jobs for {steps} steps; each starts once those that it comes after have ended with 0."
        + arrays,
        *lines,
    ]


def submit_chain(chain: Chain, cluster: Cluster, directory: Path) -> list[SubmittedJob]:
    """Queue all steps. Raises `SlurmError` if Slurm refuses one, after the others have been cancelled."""
    ids: dict[str, int] = {}
    submitted = []
    try:
        for each in chained_jobs(chain, cluster, directory):
            job = each.job
            before = tuple(dict.fromkeys(ids[other] for other in each.steps[0].after))
            number = slurm.submit(job, each.cluster, after=before)
            ids |= {step.name: number for step in each.steps}
            folders = {launch_folder(directory / chain.run_dir), job.folder}
            if not job.tasks:
                submitted.append(record_job(folders, job, number, after=before))
            for index, (command, run_dir) in enumerate(job.tasks):
                own = {*folders, launch_folder(directory / run_dir)}
                task = f"{number}_{index}"
                found = record_job(own, job, task, after=before, command=command, run_dir=run_dir)
                submitted.append(found)
    except slurm.SlurmError:
        slurm.cancel(list(dict.fromkeys(ids.values())))
        raise
    return submitted
