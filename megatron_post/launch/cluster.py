"""The cluster file: what a site's Slurm wants to be told, apart from any run."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_post.config.consistency import Needs, without_effect
from megatron_post.config.load import load_section
from megatron_post.config.section import Count, Line, Name, Section, Whole

_TIME_LIMIT = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d\d)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What says which rank a process is. train.sbatch clears it, and each rank has its own from Slurm.
_OF_A_RANK = re.compile(
    r"((LOCAL|GROUP|ROLE|NODE)_)?(RANK|WORLD_SIZE)|(TORCHELASTIC|OMPI_COMM_WORLD|MV2_COMM_WORLD)_\w+"
    r"|PMI_(RANK|SIZE)|MASTER_(ADDR|PORT)|SLURM_(PROCID|LOCALID|STEP_NUM_TASKS)|MEGATRON_POST_(INCARNATION|NUMA_BINDING)"
)


class Container(Section):
    """A pyxis container in which the ranks run (`srun --container-image`)."""

    image: Name = Field(description="a .sqsh file, or registry#image:tag")
    mounts: tuple[Line, ...] = Field((), description="HOST:CONTAINER[:ro] each")

    @field_validator("mounts")
    @classmethod
    def _two_absolute_paths(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [text for text in mounts if "," in text or not re.fullmatch(r"/[^:]*:/[^:]*(:\w+)?", text)]
        if wrong:
            raise ValueError(f"mounts must read /host:/container[:flags], without commas: {', '.join(wrong)}")
        return mounts


class Cluster(Section):
    """How jobs are submitted and ranks are started on one cluster."""

    partition: Name | None = Field(None, description="as sbatch --partition")
    account: Name | None = Field(None, description="as sbatch --account")
    qos: Name | None = Field(None, description="as sbatch --qos")
    constraint: Name | None = Field(None, description="as sbatch --constraint: features of the nodes")
    exclude: tuple[Name, ...] = Field((), description="nodes never to be used")
    exclusive: bool = Field(True, description="whole nodes, as sbatch --exclusive")
    memory: Name | None = Field(None, description="memory of a node, as sbatch --mem; 0: all of it")
    gpus_per_node: Whole = Field(8, description="GPUs asked for on each node; 0: none")
    gpu_type: Name | None = Field(None, description="type in Slurm's GRES, where it has one: h100")
    gpu: Name | None = Field(
        "h100-80gb", description="the planner's name of the GPU, by which memory is checked; null: it is not"
    )
    cpus_per_node: Count = Field(description="CPU cores asked for on each node, divided among its ranks")
    ranks_per_node: Count | None = Field(None, description="null: one for each GPU")
    time_limit: Name = Field("24:00:00", description="[days-]hours:minutes:seconds")
    warning_seconds: int = Field(
        300,
        ge=1,
        le=65535,
        description="ranks are told to save so long ahead of the time limit or preemption",
    )
    max_stalled_restarts: Whole = Field(
        3, description="restarts in a row without a new checkpoint before the job stops"
    )
    node_check: bool = Field(True, description="check nodes and links before the ranks start")
    python: Name | None = Field(
        None, description="interpreter of the ranks; null: the one that launches, in a container python3"
    )
    container: Container | None = None
    numa_binding: Literal["node", "socket", "exclusive", "core-complex"] | None = Field(
        None,
        description="CPUs of a rank, by the place of its GPU, as torchrun --numa-binding has them; null: as "
        "Slurm binds tasks",
    )
    environment: dict[str, Line] = Field(default_factory=dict, description="variables of the ranks")
    setup: tuple[Line, ...] = Field((), description="lines of bash before anything runs: module load ...")

    @field_validator("time_limit")
    @classmethod
    def _is_a_time(cls, text: str) -> str:
        if not _TIME_LIMIT.fullmatch(text):
            raise ValueError(f"{text!r} is no [days-]hours:minutes:seconds")
        return text

    @field_validator("environment")
    @classmethod
    def _are_variables(cls, variables: dict[str, str]) -> dict[str, str]:
        wrong = [name for name in variables if not _VARIABLE.fullmatch(name)]
        if wrong:
            raise ValueError(f"no names of environment variables: {', '.join(map(repr, wrong))}")
        if taken := [name for name in variables if _OF_A_RANK.fullmatch(name)]:
            raise ValueError(
                f"{', '.join(taken)} cannot be set here: the job's script sets for each rank what it must "
                "know of itself and of the others. Remove the entry"
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
        """Ranks on a node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def seconds(self) -> int:
        """The time limit."""
        match = _TIME_LIMIT.fullmatch(self.time_limit)
        assert match
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster file and its `base:`. Raises `ConfigError` with every error at once."""
    return load_section(Cluster, path)
