"""Plans a conversion: what it would read and write, computed from config and index alone."""

from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_post.config.presets import PRESETS
from megatron_post.config.sections import Model
from megatron_post.convert.configs import read_model
from megatron_post.convert.hf_directory import needed_names, read_index
from megatron_post.convert.mapping import hf_shapes
from megatron_post.convert.shards import plan_shards
from megatron_post.convert.source import DTYPE_NAMES, Kind, check_names
from megatron_post.convert.to_megatron import PART_BYTES
from megatron_post.storage.reading import did_you_mean, did_you_mean_path

# Resident memory of a worker: Python, torch, headers and buffers. About 330 MiB were measured, whatever the
# model.
BASE_BYTES = 400 * 1024**2
# Speed of a worker with two cores to itself. From 560 to 1,080 were measured (docs/benchmarks.md).
WORKER_MEGABYTES_PER_SECOND = 800.0


@dataclass(frozen=True)
class Plan:
    """Figures of a conversion.

    peak_bytes: of all processes of a node together. workers_decide: whether more workers would make it
    faster. If not, the disk limits it.
    """

    tensors: int
    total_bytes: int
    largest_bytes: int
    shards: int
    parts: int
    peak_bytes: int
    seconds: float
    workers_decide: bool


def plan(source: str, *, dtype: str, max_shard_bytes: int, workers: int, megabytes_per_second: float) -> Plan:
    """The figures of a conversion. source: a preset's name, or a Hugging Face directory.

    The directory needs `config.json`. The index is optional, and the weights are not needed. Raises
    `ValueError` if the index is not that of the config's model.
    """
    kinds = {name: Kind(DTYPE_NAMES[dtype], shape) for name, shape in hf_shapes(_model(source)).items()}
    total = sum(kind.nbytes for kind in kinds.values())
    workers_speed = workers * WORKER_MEGABYTES_PER_SECOND
    return Plan(
        tensors=len(kinds),
        total_bytes=total,
        largest_bytes=max(kind.nbytes for kind in kinds.values()),
        shards=len(plan_shards(kinds, max_bytes=max_shard_bytes)),
        parts=-(-total // PART_BYTES),
        peak_bytes=(workers + (workers > 1)) * BASE_BYTES,  # several workers have a parent process
        seconds=total / (min(megabytes_per_second, workers_speed) * 1e6),
        workers_decide=workers_speed < megabytes_per_second,
    )


def print_plan(source: str, result: Plan, *, console: Console) -> None:
    """Print the plan as a table."""
    hours, minutes = divmod(round(result.seconds / 60), 60)
    table = Table(f"conversion of {source}", "", box=SIMPLE)
    table.add_row("tensors", f"{result.tensors:,}")
    table.add_row("bytes to read, and to write", f"{result.total_bytes:,}")
    table.add_row("largest tensor", f"{result.largest_bytes:,}")
    table.add_row("safetensors files; checkpoint files", f"{result.shards:,}; {result.parts:,}")
    table.add_row("expected peak memory", f"{result.peak_bytes / 2**30:.1f} GiB")
    time = f"{hours} h {minutes} min" if result.seconds > 120 else f"{result.seconds:.0f} s"
    table.add_row("expected time", time + ("; more workers would help" if result.workers_decide else ""))
    console.print(table)


def _model(source: str) -> Model:
    if source in PRESETS:
        return Model(preset=source)  # type: ignore[call-arg]
    directory = Path(source)
    if not directory.is_dir():
        meant = did_you_mean(source, list(PRESETS)) or did_you_mean_path(directory)
        raise ValueError(f"{source} is neither a directory nor one of {', '.join(PRESETS)}{meant}")
    model = read_model(directory)
    try:
        weight_map = read_index(directory)
    except ValueError as error:
        if "holds neither" not in str(error):
            raise
        weight_map = None
    if weight_map is not None:
        check_names(dict.fromkeys(needed_names(weight_map, model)), hf_shapes(model), origin=directory)
    return model
