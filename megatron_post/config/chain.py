"""A chain of jobs. Each job is a megatron-post command that starts after its predecessors have succeeded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megatron_post.config.load import ConfigError, load_config, load_section, read_tree
from megatron_post.config.schema import Config
from megatron_post.config.section import Count, Line, Name, Section, Whole
from megatron_post.storage.reading import did_you_mean


class ChainTask(Section):
    """A command of a chain."""

    command: tuple[Line, ...] = Field(min_length=1, description="arguments that follow `megatron-post`")
    run_dir: Name | None = Field(
        None, description="output directory of a training step, which holds its checkpoints"
    )
    like: Config | None = Field(
        None,
        description="a similar run, which is checked in place of a training step whose config does not exist "
        "yet. Either its settings or a list of arguments of `train`, with paths relative to the current "
        "directory",
    )

    @field_validator("like", mode="before", json_schema_input_type=Config | tuple[Line, ...] | None)
    @classmethod
    def _settings_of(cls, value: Any, info: ValidationInfo) -> Any:
        """The settings themselves, or the config that a list of arguments of `train` names."""
        command = (info.data.get("command") or ("train",))[0]
        if value is not None and command != "train":
            raise ValueError(f"it has no effect with command {command}, only with train")
        if not isinstance(value, list | tuple):
            return value
        if not value or not all(isinstance(word, str) for word in value):
            raise ValueError("a list here has the arguments of `train`, CONFIG and any KEY=VALUE, as texts")
        return load_config(value[0], value[1:])


class ChainJob(ChainTask):
    """One job of a chain, or a Slurm array of jobs, each with a command of its own."""

    # The default is not validated. An array has no command of its own.
    command: tuple[Line, ...] = Field((), min_length=1, description="arguments that follow `megatron-post`")
    name: Name = Field(description="name of the job, by which `after` of other steps refers to it")
    tasks: tuple[ChainTask, ...] = Field(
        (), description="in place of a command, the commands of a Slurm array. All of them must succeed"
    )
    nodes: Count = Field(1, description="nodes of the job, or of each task of an array")
    ranks_per_node: Count | None = Field(
        None,
        description="1 is a single process. null takes the cluster's value, or 1 for a step without GPUs",
    )
    gpus_per_rank: Whole | None = Field(
        None,
        description="GPUs that each rank uses. A step with 0 runs without GPUs, on `cpu_partition` of the "
        "cluster. null is 0 for commands that use none, such as data, select and merge, and otherwise 1",
    )
    after: tuple[Name, ...] = Field((), description="steps that must have exited with status 0")

    @property
    def commands(self) -> tuple[ChainTask, ...]:
        """The tasks of an array, or the job itself."""
        return self.tasks or (self,)

    @model_validator(mode="after")
    def _has_commands(self) -> "ChainJob":
        if bool(self.command) == bool(self.tasks):
            raise ValueError(f"step {self.name!r} needs either a command or tasks")
        if self.tasks and self.like is not None:
            raise ValueError(f"step {self.name!r}: `like` belongs to each of its tasks")
        return self


class Chain(Section):
    """A chain file."""

    run_dir: Name = Field(
        description="directory for the logs of steps without a run_dir and for the record of all jobs"
    )
    steps: tuple[ChainJob, ...] = Field(min_length=1)

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

    def ordered(self) -> list[ChainJob]:
        """The steps in an order that respects `after`. Other steps keep the order of the file."""
        done: list[ChainJob] = []
        waiting = list(self.steps)
        while waiting:
            names = {step.name for step in done}
            step = next(step for step in waiting if set(step.after) <= names)
            waiting.remove(step)
            done.append(step)
        return done


def is_chain(path: str | Path) -> bool:
    """Whether a file describes a chain, which has `steps`, and not a round."""
    return "steps" in read_tree(path)


def load_chain(path: str | Path, overrides: Sequence[str] = ()) -> Chain:
    """Read a chain file. Raises `ConfigError` with every error at once."""
    if overrides:
        raise ConfigError(f"{path} is a chain of commands with overrides of their own: {' '.join(overrides)}")
    return load_section(Chain, path)
