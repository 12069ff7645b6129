"""Check, print and submit the jobs of a chain."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_post.config.chain import Chain, ChainTask
from megatron_post.config.load import ConfigError, load_config
from megatron_post.launch import slurm
from megatron_post.launch.cluster import Cluster
from megatron_post.launch.preflight import disk_findings, layout_findings, memory_findings
from megatron_post.launch.record import SubmittedJob, record_job
from megatron_post.launch.script import Job, launch_folder
from megatron_post.storage.reading import did_you_mean


def slurm_jobs(chain: Chain, directory: Path) -> dict[str, Job]:
    """The Slurm job of each step by the step's name, in the order in which they are submitted."""
    return {
        step.name: Job(
            name=step.name,
            command=step.command,
            run_dir=step.run_dir or chain.run_dir,
            directory=directory,
            nodes=step.nodes,
            ranks_per_node=step.ranks_per_node,
            array=len(step.tasks) or None,
            tasks=tuple((task.command, task.run_dir or chain.run_dir) for task in step.tasks),
        )
        for step in chain.ordered()
    }


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


def chain_findings(chain: Chain, cluster: Cluster, directory: Path, *, disks: bool = True) -> list[str]:
    """Find the steps that cannot run on this cluster.

    A step may have more ranks than a node has. The layout of a training step may be impossible, its memory
    may not suffice and, if `disks` is set, its disk may be too full.
    """
    found = []
    for step in chain.ordered():
        ranks = step.ranks_per_node or cluster.ranks
        if ranks > cluster.ranks:
            own = [f"ranks_per_node={ranks} is more than the cluster's {cluster.ranks}"]
        else:
            nodes_of_step = cluster.model_copy(update={"ranks_per_node": ranks})
            own = [
                text
                for task in step.commands
                for text in _train_findings(task, step.nodes, nodes_of_step, directory, disks=disks)
            ]
        found += [f"step {step.name!r}: {text}" for text in own]
    return found


def _train_findings(
    step: ChainTask, nodes: int, cluster: Cluster, directory: Path, *, disks: bool
) -> list[str]:
    command, *arguments = step.command
    if command != "train" or not arguments:
        return []
    if (directory / arguments[0]).is_file():
        try:
            config = load_config(directory / arguments[0], arguments[1:])
        except ConfigError as error:
            return [str(error)]
    elif step.like is not None:
        config = step.like
    else:
        return []
    found = layout_findings(config, cluster, nodes=nodes)
    found = found or memory_findings(config, cluster, nodes=nodes)
    if disks:
        run_dir = step.run_dir or config.run_dir
        found += disk_findings(config.model_copy(update={"run_dir": run_dir}), directory)
    return found


def job_table(chain: Chain, cluster: Cluster) -> list[str]:
    """Lines of a table for printing: each job with its nodes x ranks, its predecessors and its command."""
    rows = [("job", "nodes x ranks", "after", "command")]
    rows += [
        (
            step.name + (f"[{number}]" if step.tasks else ""),
            f"{step.nodes} x {step.ranks_per_node or cluster.ranks}",
            ", ".join(step.after) or "-",
            shlex.join(task.command),
        )
        for step in chain.ordered()
        for number, task in enumerate(step.commands)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in rows]
    arrays = " [n] is task n of an array." if any(step.tasks for step in chain.steps) else ""
    return [
        f"{len(chain.steps)} jobs; each starts once those that it comes after have ended with 0.{arrays}",
        *lines,
    ]


def submit_chain(chain: Chain, cluster: Cluster, directory: Path) -> list[SubmittedJob]:
    """Queue all steps. Raises `SlurmError` if Slurm refuses one, after the others have been cancelled."""
    jobs = slurm_jobs(chain, directory)
    ids: dict[str, int] = {}
    after = {step.name: step.after for step in chain.steps}
    submitted = []
    try:
        for name, job in jobs.items():
            before = tuple(ids[other] for other in after[name])
            ids[name] = slurm.submit(job, cluster, after=before)
            folders = {launch_folder(directory / chain.run_dir), job.folder}
            if not job.tasks:
                submitted.append(record_job(folders, job, ids[name], after=before))
            for number, (command, run_dir) in enumerate(job.tasks):
                own = {*folders, launch_folder(directory / run_dir)}
                task = f"{ids[name]}_{number}"
                found = record_job(own, job, task, after=before, command=command, run_dir=run_dir)
                submitted.append(found)
    except slurm.SlurmError:
        slurm.cancel(list(ids.values()))
        raise
    return submitted
