"""A chain of jobs. Each step is a megatron-post command that starts after its predecessors have succeeded."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from megatron_post.config.load import ConfigError, load_config, load_section, parse, read_tree
from megatron_post.config.section import Count, Line, Name, Section
from megatron_post.launch import slurm
from megatron_post.launch.cluster import Cluster
from megatron_post.launch.preflight import disk_findings, layout_findings, memory_findings
from megatron_post.launch.record import Submitted, remember
from megatron_post.launch.script import Job, launch_folder
from megatron_post.storage.reading import did_you_mean


class ChainStep(Section):
    """One job of a chain."""

    name: Name = Field(description="name of the job, by which `after` of other steps refers to it")
    command: tuple[Line, ...] = Field(min_length=1, description="arguments that follow `megatron-post`")
    run_dir: Name | None = Field(
        None, description="output directory of a training step, which holds its checkpoints"
    )
    like: tuple[Line, ...] = Field(
        (),
        description="arguments of `train` for a similar run, which is checked in place of a training step "
        "whose config does not exist yet",
    )
    nodes: Count = Field(1, description="nodes of the job")
    ranks_per_node: Count | None = Field(
        None, description="null takes the cluster's value, 1 is a single process"
    )
    after: tuple[Name, ...] = Field((), description="steps that must have exited with status 0")

    @model_validator(mode="after")
    def _like_a_training_step(self) -> "ChainStep":
        if self.like and self.command[0] != "train":
            raise ValueError(
                f"like={list(self.like)} has no effect with command {self.command[0]}, only with train"
            )
        return self


class Chain(Section):
    """A chain file."""

    run_dir: Name = Field(
        description="directory for the logs of steps without a run_dir and for the record of all jobs"
    )
    steps: tuple[ChainStep, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _can_be_ordered(self) -> "Chain":
        names = [step.name for step in self.steps]
        errors = [
            f"step {name!r} is named twice" for name in sorted({n for n in names if names.count(n) > 1})
        ]
        errors += [
            f"step {step.name!r} comes after {name!r}, which is not a step{did_you_mean(name, names)}"
            for step in self.steps
            for name in step.after
            if name not in names
        ]
        if not errors:
            left = {step.name: set(step.after) for step in self.steps}
            while ready := [name for name, after in left.items() if not after & left.keys()]:
                for name in ready:
                    del left[name]
            if left:
                errors.append(f"steps wait for each other: {', '.join(left)}")
        if errors:
            raise ValueError("\n".join(errors))
        return self

    def ordered(self) -> list[ChainStep]:
        """The steps in an order that respects `after`. Other steps keep the order of the file."""
        done: list[ChainStep] = []
        waiting = list(self.steps)
        while waiting:
            names = {step.name for step in done}
            step = next(step for step in waiting if set(step.after) <= names)
            waiting.remove(step)
            done.append(step)
        return done

    def jobs(self, directory: Path) -> dict[str, Job]:
        """The job of each step by the step's name, in the order in which they are submitted."""
        return {
            step.name: Job(
                name=step.name,
                command=step.command,
                run_dir=step.run_dir or self.run_dir,
                directory=directory,
                nodes=step.nodes,
                ranks_per_node=step.ranks_per_node,
            )
            for step in self.ordered()
        }


def is_chain(path: str | Path) -> bool:
    """Whether a file describes a chain, which has `steps`, and not a round."""
    return "steps" in read_tree(path)


def load_chain(path: str | Path, overrides: Sequence[str] = ()) -> Chain:
    """Read a chain file. Raises `ConfigError` with every error at once."""
    if overrides:
        raise ConfigError(f"{path} is a chain of commands with overrides of their own: {' '.join(overrides)}")
    return load_section(Chain, path)


def parse_chain(values: Any, *, origin: str) -> Chain:
    """Validate a chain that is given as plain values. `origin` names their source in the `ConfigError`."""
    return parse(Chain, values, origin=origin)


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
            own = _train_findings(step, nodes_of_step, directory, disks=disks)
        found += [f"step {step.name!r}: {text}" for text in own]
    return found


def _train_findings(step: ChainStep, cluster: Cluster, directory: Path, *, disks: bool) -> list[str]:
    command, *arguments = step.command
    if command != "train" or not arguments:
        return []
    if not (directory / arguments[0]).is_file():
        if not step.like:
            return []
        arguments = list(step.like)
    try:
        config = load_config(directory / arguments[0], arguments[1:])
    except ConfigError as error:
        return [str(error)]
    found = layout_findings(config, cluster, nodes=step.nodes)
    found = found or memory_findings(config, cluster, nodes=step.nodes)
    if disks:
        run_dir = step.run_dir or config.run_dir
        found += disk_findings(config.model_copy(update={"run_dir": run_dir}), directory)
    return found


def job_table(chain: Chain, cluster: Cluster) -> list[str]:
    """Lines of a table for printing: each job with its nodes x ranks, its predecessors and its command."""
    rows = [("job", "nodes x ranks", "after", "command")]
    rows += [
        (
            step.name,
            f"{step.nodes} x {step.ranks_per_node or cluster.ranks}",
            ", ".join(step.after) or "-",
            shlex.join(step.command),
        )
        for step in chain.ordered()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in rows]
    return [f"{len(chain.steps)} jobs; each starts once those that it comes after have ended with 0", *lines]


def submit_chain(chain: Chain, cluster: Cluster, directory: Path) -> list[Submitted]:
    """Queue all steps. Raises `SlurmError` if Slurm refuses one, after the others have been cancelled."""
    jobs = chain.jobs(directory)
    ids: dict[str, int] = {}
    after = {step.name: step.after for step in chain.steps}
    submitted = []
    try:
        for name, job in jobs.items():
            before = tuple(ids[other] for other in after[name])
            ids[name] = slurm.submit(job, cluster, after=before)
            folders = {launch_folder(directory / chain.run_dir), job.folder}
            submitted.append(remember(folders, job, ids[name], after=before))
    except slurm.SlurmError:
        slurm.cancel(list(ids.values()))
        raise
    return submitted
