"""The cluster file: what a site's Slurm wants to be told, apart from any run."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, field_validator, model_validator

from megatron_post.config.load import completed, parse, read_tree
from megatron_post.config.schema import Section
from megatron_post.display import printable

_TIME_LIMIT = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d\d)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What says which rank a process is. train.sbatch clears it, and each rank has its own from Slurm.
_OF_A_RANK = re.compile(
    r"((LOCAL|GROUP|ROLE|NODE)_)?(RANK|WORLD_SIZE)|(TORCHELASTIC|OMPI_COMM_WORLD|MV2_COMM_WORLD)_\w+"
    r"|PMI_(RANK|SIZE)|MASTER_(ADDR|PORT)|SLURM_(PROCID|LOCALID|STEP_NUM_TASKS)|MEGATRON_POST_(INCARNATION|NUMA_BINDING)"
)


def one_line(text: str) -> str:
    """A value that Slurm or a script takes as one line. Raises `ValueError` for control characters, and for
    others that a terminal does not show."""
    if set(text) & set("\n\t") or printable(text) != text:
        raise ValueError(f"{text!r} holds a newline or another control character")
    return text


def _is_text(value: Any) -> Any:
    """YAML reads 24:00:00 as 86400 and yes as true: what was meant is not to be guessed."""
    if isinstance(value, int | float):
        raise ValueError(f"{value!r} is no text: put the value in quotes in the file")
    return value


Line = Annotated[str, BeforeValidator(_is_text), AfterValidator(one_line), Field(min_length=1)]


class Container(Section):
    """A pyxis container in which the ranks run (`srun --container-image`)."""

    image: Line = Field(description="a .sqsh file, or registry#image:tag")
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

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    exclude: tuple[Line, ...] = Field((), description="nodes never to be used")
    exclusive: bool = True
    memory: Line | None = Field(None, description="memory of a node, as sbatch --mem; 0: all of it")
    gpus_per_node: int = Field(8, ge=0)
    gpu_type: Line | None = Field(None, description="type in Slurm's GRES, where it has one: h100")
    gpu: Line | None = Field(
        "h100-80gb", description="the planner's name of the GPU, by which memory is checked; null: it is not"
    )
    cpus_per_node: PositiveInt
    ranks_per_node: PositiveInt | None = Field(None, description="null: one for each GPU")
    time_limit: Line = Field("24:00:00", description="[days-]hours:minutes:seconds")
    warning_seconds: int = Field(
        300,
        ge=1,
        le=65535,
        description="ranks are told to save so long ahead of the time limit or preemption",
    )
    max_stalled_restarts: int = Field(
        3, ge=0, description="restarts in a row without a new checkpoint before the job stops"
    )
    node_check: bool = Field(True, description="check nodes and links before the ranks start")
    python: Line | None = Field(
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
            raise ValueError(f"{text!r} is no [days-]hours:minutes:seconds (quote it in YAML)")
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
        errors = []
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
    return parse(Cluster, completed(read_tree(path), origin=str(path)), origin=str(path))
