"""The cluster file: the settings of a site's Slurm that are the same for all runs."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_post.config.consistency import Needs, without_effect
from megatron_post.config.load import load_section
from megatron_post.config.section import Count, Line, Name, Section, Whole

_TIME_LIMIT = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d\d)")
CPUS = 8  # of a process without GPUs, if its node has so many
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Variables that identify a rank. train.sbatch clears them, and each rank gets its own values from Slurm.
# A value for the whole cluster would give all ranks the same identity.
_RANK_VARIABLE = re.compile(
    r"((LOCAL|GROUP|ROLE|NODE)_)?(RANK|WORLD_SIZE)|(TORCHELASTIC|OMPI_COMM_WORLD|MV2_COMM_WORLD)_\w+"
    r"|PMI_(RANK|SIZE)|MASTER_(ADDR|PORT)|SLURM_(PROCID|LOCALID|STEP_NUM_TASKS)|MEGATRON_POST_(INCARNATION|NUMA_BINDING)"
)


class Container(Section):
    """A pyxis container in which the ranks run (`srun --container-image`)."""

    image: Name = Field(description="a .sqsh file or registry#image:tag")
    mounts: tuple[Line, ...] = Field((), description="list of HOST:CONTAINER[:ro]")

    @field_validator("mounts")
    @classmethod
    def _two_absolute_paths(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [text for text in mounts if "," in text or not re.fullmatch(r"/[^:]*:/[^:]*(:\w+)?", text)]
        if wrong:
            raise ValueError(f"mounts must read /host:/container[:flags], without commas: {', '.join(wrong)}")
        return mounts


class Cluster(Section):
    """How jobs are submitted and ranks are started on one cluster."""

    partition: Name | None = Field(None, description="passed to sbatch --partition")
    cpu_partition: Name | None = Field(
        None, description="partition of jobs that use no GPU. null takes `partition`"
    )
    cpu_memory: Name | None = Field(
        None,
        description="host memory per node of jobs that use no GPU, passed to sbatch --mem. null takes "
        "Slurm's default",
    )
    account: Name | None = Field(None, description="passed to sbatch --account")
    qos: Name | None = Field(None, description="passed to sbatch --qos")
    constraint: Name | None = Field(
        None,
        description="features that nodes must have, passed to sbatch --constraint. Jobs on `cpu_partition` "
        "are without it",
    )
    exclude: tuple[Name, ...] = Field((), description="nodes that are never used, passed to sbatch --exclude")
    exclusive: bool = Field(True, description="allocate whole nodes (sbatch --exclusive)")
    memory: Name | None = Field(
        None, description="host memory per node, passed to sbatch --mem. 0 requests all of it"
    )
    gpus_per_node: Whole = Field(8, description="number of GPUs requested per node")
    gpu_type: Name | None = Field(
        None, description="GPU type in Slurm's GRES, for example h100, if the site defines one"
    )
    gpu: Name | None = Field(
        "h100-80gb",
        description="the planner's name of the GPU, for the memory check. null turns the check off",
    )
    cpus_per_node: Count = Field(
        description="number of CPU cores requested per node, which its ranks share equally"
    )
    ranks_per_node: Count | None = Field(None, description="null starts one rank per GPU")
    time_limit: Name = Field("24:00:00", description="[days-]hours:minutes:seconds")
    warning_seconds: int = Field(
        300,
        ge=1,
        le=65535,
        description="seconds before the time limit or preemption at which ranks receive the signal to save",
    )
    max_stalled_restarts: Whole = Field(
        3, description="number of consecutive restarts without a new checkpoint after which the job stops"
    )
    node_check: bool = Field(True, description="check nodes and links before training starts")
    python: Name | None = Field(
        None,
        description="Python interpreter of the ranks. null takes the interpreter that runs `launch`, or "
        "python3 in a container",
    )
    container: Container | None = None
    numa_binding: Literal["node", "socket", "exclusive", "core-complex"] | None = Field(
        None,
        description="bind a rank to the CPUs near its GPU, with the modes of torchrun --numa-binding. null "
        "leaves the binding to Slurm",
    )
    environment: dict[str, Line] = Field(
        default_factory=dict, description="environment variables of the ranks"
    )
    setup: tuple[Line, ...] = Field(
        (), description="lines of bash that run first, for example module load ..."
    )

    @field_validator("time_limit")
    @classmethod
    def _is_a_time(cls, text: str) -> str:
        if not _TIME_LIMIT.fullmatch(text):
            raise ValueError(f"{text!r} is not written as [days-]hours:minutes:seconds")
        return text

    @field_validator("environment")
    @classmethod
    def _are_variables(cls, variables: dict[str, str]) -> dict[str, str]:
        wrong = [name for name in variables if not _VARIABLE.fullmatch(name)]
        if wrong:
            raise ValueError(f"these cannot be names of environment variables: {', '.join(map(repr, wrong))}")
        if taken := [name for name in variables if _RANK_VARIABLE.fullmatch(name)]:
            raise ValueError(
                f"{', '.join(taken)} cannot be set here, because the job's script sets the variables that "
                "identify each rank. Remove the entry"
            )
        return variables

    @model_validator(mode="after")
    def _adds_up(self) -> "Cluster":
        errors = without_effect(self, (Needs("gpu_type", "gpus_per_node", above=0),))
        if not self.gpus_per_node and self.ranks_per_node is None:
            errors.append("gpus_per_node=0 needs ranks_per_node")
        elif self.gpus_per_node and self.ranks > self.gpus_per_node:
            errors.append(f"ranks_per_node={self.ranks} is more than gpus_per_node={self.gpus_per_node}")
        if self.numa_binding and not self.gpus_per_node:
            errors.append(f"numa_binding={self.numa_binding} needs GPUs on the nodes; set numa_binding: null")
        if self.ranks > self.cpus_per_node:
            errors.append(
                f"cpus_per_node={self.cpus_per_node} is less than one for each of {self.ranks} ranks"
            )
        if self.warning_seconds >= self.seconds:
            errors.append(
                f"warning_seconds={self.warning_seconds} is not within time_limit={self.time_limit}"
            )
        if errors:
            raise ValueError("\n".join(errors))
        return self

    @property
    def ranks(self) -> int:
        """Number of ranks per node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def seconds(self) -> int:
        """The time limit in seconds."""
        match = _TIME_LIMIT.fullmatch(self.time_limit)
        assert match
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def without_gpus(cluster: Cluster, *, cpus: int, ranks: int = 1) -> Cluster:
    """The cluster settings of a job that takes a part of a node and no GPU.

    cpus: cores of each node, which its ranks share.
    """
    return cluster.model_copy(
        update={
            "partition": cluster.cpu_partition or cluster.partition,
            "constraint": None if cluster.cpu_partition else cluster.constraint,
            "gpus_per_node": 0,
            "gpu_type": None,
            "numa_binding": None,
            "ranks_per_node": ranks,
            "cpus_per_node": cpus,
            "exclusive": False,
            "memory": cluster.cpu_memory,
        }
    )


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster file and its `base:`. Raises `ConfigError` with every error at once."""
    return load_section(Cluster, path)
