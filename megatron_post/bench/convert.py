"""Measures conversion of synthetic models both ways beside `cp` of the same bytes: memory and speed."""

import filecmp
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from megatron_post.bench import beside_copy
from megatron_post.bench.environment import environment
from megatron_post.bench.record import Figure, Record, once
from megatron_post.bench.tables import titled
from megatron_post.config.sections import Model
from megatron_post.convert.configs import index_of, written_configs
from megatron_post.convert.hf_directory import INDEX
from megatron_post.convert.jobs import Job, convert
from megatron_post.convert.mapping import hf_shapes
from megatron_post.convert.safetensors_file import header_of
from megatron_post.convert.shards import SHARD_BYTES, plan_shards, shard_name
from megatron_post.convert.source import Kind
from megatron_post.convert.to_hf import ToHuggingFace
from megatron_post.convert.to_megatron import ToMegatron

# About 1, 2 and 4 GB of the 8B's layers, and one layer of the 405B.
MODELS: dict[str, dict[str, Any]] = {
    "8B, 2 layers": {"preset": "llama3_8b", "num_layers": 2, "vocab_size": 8192},
    "8B, 4 layers": {"preset": "llama3_8b", "num_layers": 4, "vocab_size": 8192},
    "8B, 9 layers": {"preset": "llama3_8b", "num_layers": 9, "vocab_size": 8192},
    "405B, 1 layer": {"preset": "llama3.1_405b", "num_layers": 1, "vocab_size": 512},
}
SMALL = ("8B, 2 layers", "8B, 4 layers")


@dataclass(frozen=True)
class ConversionFigures:
    """Figures of one model.

    Speeds are in MB/s, as medians over rounds. Peaks are in MiB of one process, as the largest of the rounds.
    copy: of `cp` alone. durable_copy: of `cp` with its bytes flushed to the disk, as a conversion's are. The
    ratios divide the speed of a conversion by `durable_copy`, as medians over rounds. rounds: MB/s of the
    four, of each round.
    """

    name: str
    total_bytes: int
    largest_bytes: int
    copy: float
    durable_copy: float
    to_megatron: float
    to_hf: float
    to_megatron_ratio: float
    to_hf_ratio: float
    to_megatron_peak: float
    to_hf_peak: float
    rounds: tuple[tuple[float, ...], ...]


def measure_conversions(
    directory: Path, *, names: tuple[str, ...] = tuple(MODELS), rounds: int = 3, workers: int = 1
) -> list[ConversionFigures]:
    """Convert each model both ways, in turn with `cp`, `rounds` times, and compare with the source.

    This takes the disk space of four copies of the largest model, and removes everything. Raises `ValueError`
    if there is less space, for names that are not in `MODELS`, and for less than one round.
    """
    unknown = [name for name in names if name not in MODELS]
    if unknown or rounds < 1:
        raise ValueError(
            f"--model {unknown} --rounds {rounds}: choose from {', '.join(map(repr, MODELS))}, and 1 round "
            "or more"
        )
    return [_measure(directory, name, rounds=rounds, workers=workers) for name in names]


def conversion_table(figures: list[ConversionFigures], *, workers: int) -> Table:
    """A table with a row for each model."""
    title = (
        f"conversion with {workers} worker(s): MB/s, and percent of the speed of cp + sync; "
        "peak memory and its limit in MiB"
    )
    columns = ("model", "GB", "cp", "cp+sync", "to Megatron", "to HF", "peak", "limit")
    table = titled(title, columns)
    for f in figures:
        table.add_row(
            f.name,
            f"{f.total_bytes / 1e9:.2f}",
            f"{f.copy:,.0f}",
            f"{f.durable_copy:,.0f}",
            f"{f.to_megatron:,.0f} ({f.to_megatron_ratio:.0%})",
            f"{f.to_hf:,.0f} ({f.to_hf_ratio:.0%})",
            f"{max(f.to_megatron_peak, f.to_hf_peak):,.0f}",
            f"{(2 * f.largest_bytes + 2**30) / 2**20:,.0f}",
        )
    return table


def conversion_record(figures: list[ConversionFigures], *, workers: int) -> Record:
    """The record with the speeds of every round, and the peaks."""
    found = {}
    for f in figures:
        for i, name in enumerate(("cp", "cp + flush", "to Megatron", "to Hugging Face")):
            found[f"{f.name}: {name}"] = Figure("MB/s", tuple(row[i] for row in f.rounds), "higher")
        found[f"{f.name}: peak"] = once("MiB", max(f.to_megatron_peak, f.to_hf_peak), "lower")
    return Record(
        benchmark="convert",
        subject="synthetic models beside cp",
        settings={"workers": str(workers), "models": ", ".join(f.name for f in figures)},
        figures=found,
        environment=environment(),
    )


def _measure(directory: Path, name: str, *, rounds: int, workers: int) -> ConversionFigures:
    model = Model(**MODELS[name])
    kinds = {n: Kind(torch.bfloat16, shape) for n, shape in hf_shapes(model).items()}
    total = sum(kind.nbytes for kind in kinds.values())
    if shutil.disk_usage(directory).free < 5 * total:
        raise ValueError(f"{directory} has less than {5 * total:,} bytes free, which this benchmark needs")
    source, copy, root, back = (directory / n for n in ("source", "copy", "checkpoints", "back"))
    columns: list[tuple[float, ...]] = []
    try:
        _write_random(source, model, kinds)
        for _ in range(rounds):
            plain, durable = beside_copy.copy(source, copy)
            to_megatron, to_hf = ToMegatron(str(source), str(root)), ToHuggingFace(str(root), str(back))
            forth, forth_peak = beside_copy.in_own_process(_convert, to_megatron, workers, workers=workers)
            back_seconds, back_peak = beside_copy.in_own_process(_convert, to_hf, workers, workers=workers)
            _, wrong, missing = filecmp.cmpfiles(
                source, back, [file.name for file in source.iterdir()], shallow=False
            )
            assert not wrong and not missing, f"{wrong or missing} differ after conversion there and back"
            columns.append((plain, durable, forth, back_seconds, forth_peak, back_peak))
            for path in (copy, root, back):
                shutil.rmtree(path)
    finally:
        for path in (source, copy, root, back):
            shutil.rmtree(path, ignore_errors=True)
    speeds = [median(total / 1e6 / row[i] for row in columns) for i in range(4)]
    return ConversionFigures(
        name=name,
        total_bytes=total,
        largest_bytes=max(kind.nbytes for kind in kinds.values()),
        copy=speeds[0],
        durable_copy=speeds[1],
        to_megatron=speeds[2],
        to_hf=speeds[3],
        to_megatron_ratio=median(row[1] / row[2] for row in columns),
        to_hf_ratio=median(row[1] / row[3] for row in columns),
        to_megatron_peak=max(row[4] for row in columns),
        to_hf_peak=max(row[5] for row in columns),
        rounds=tuple(tuple(total / 1e6 / seconds for seconds in row[:4]) for row in columns),
    )


def _write_random(directory: Path, model: Model, kinds: dict[str, Kind]) -> None:
    """Write files of random bytes. The values do not matter for this benchmark."""
    directory.mkdir(parents=True)
    shards = plan_shards(kinds, max_bytes=SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file_name = shard_name(i, len(shards))
        weight_map |= dict.fromkeys(names, file_name)
        header, places = header_of({name: (kinds[name].dtype, kinds[name].shape) for name in names})
        with (directory / file_name).open("wb") as file:
            file.write(header)
            for place in places.values():
                for start in range(0, place.nbytes, 2**24):
                    file.write(os.urandom(min(2**24, place.nbytes - start)))
            os.fsync(file.fileno())
    files = written_configs(model, None, dtype=torch.bfloat16, scalar_head=False)
    if len(shards) > 1:
        files[INDEX] = index_of(weight_map, kinds)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def _convert(job: Job, workers: int) -> None:
    convert(job, workers=workers, report=lambda line: None)
