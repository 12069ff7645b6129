"""Measures merging of two synthetic models beside `cp` of the same bytes: peak memory and speed."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from megatron_post.bench import beside_copy
from megatron_post.bench.environment import environment
from megatron_post.bench.record import Record, once
from megatron_post.config.load import parse
from megatron_post.config.sections import Model
from megatron_post.convert.configs import written_configs
from megatron_post.convert.mapping import hf_shapes
from megatron_post.convert.safetensors_file import header_of, raw_bytes
from megatron_post.rounds.merge import merge
from megatron_post.rounds.merge_settings import MethodMerge

# Gigabytes -> layers of the 8B's shape with a vocabulary of 8,192, in bf16.
LAYERS = {1: 2, 2: 4, 4: 9}
METHODS = ("linear", "slerp", "ties", "dare_ties")


@dataclass(frozen=True)
class MergeFigures:
    """One merge.

    copy, merged: MB/s of the output's bytes, flushed to the disk. peak: MiB of the process.
    """

    method: str
    total_bytes: int
    copy: float
    merged: float
    peak: float


def measure_merges(directory: Path, gigabytes: int) -> list[MergeFigures]:
    """Measure each method once, each beside a `cp` of its own.

    This takes the disk space of five models in `directory`. Raises `ValueError` for a size that is not in
    `LAYERS`.
    """
    if gigabytes not in LAYERS:
        raise ValueError(f"--gigabytes {gigabytes}: choose from {', '.join(map(str, LAYERS))}")
    model = Model(preset="llama3_8b", num_layers=LAYERS[gigabytes], vocab_size=8192)  # type: ignore[call-arg]
    paths = [directory / name for name in ("base", "a", "b")]
    copy, output = directory / "copy", directory / "merged"
    figures = []
    try:
        total, *_ = [_write_random(path, model, seed=i) for i, path in enumerate(paths)]
        for method in METHODS:
            _, copied = beside_copy.copy(paths[1], copy)
            seconds, peak = beside_copy.in_own_process(_merge, _plan(method, paths), output)
            figures.append(MergeFigures(method, total, total / 1e6 / copied, total / 1e6 / seconds, peak))
            shutil.rmtree(copy)
            shutil.rmtree(output)
    finally:
        for path in (*paths, copy, output):
            shutil.rmtree(path, ignore_errors=True)
    return figures


def merge_table(figures: list[MergeFigures]) -> Table:
    """A table with a row for each merge."""
    table = Table("method", "GB", "cp+sync MB/s", "merge MB/s", "peak MiB", box=SIMPLE)
    for f in figures:
        sizes = (f"{f.total_bytes / 1e9:.2f}", f"{f.copy:,.0f}", f"{f.merged:,.0f}", f"{f.peak:,.0f}")
        table.add_row(f.method, *sizes)
    return table


def merge_record(figures: list[MergeFigures]) -> Record:
    """The record of speeds and peaks. Each was measured once."""
    found = {}
    for f in figures:
        name = f"{f.method}, {f.total_bytes / 1e9:.2f} GB"
        found[f"{name}: cp + flush"] = once("MB/s", f.copy, "higher")
        found[f"{name}: merge"] = once("MB/s", f.merged, "higher")
        found[f"{name}: peak"] = once("MiB", f.peak, "lower")
    return Record("merge", "synthetic models beside cp", {}, found, environment())


def _plan(method: str, paths: list[Path]) -> MethodMerge:
    density = {"density": 0.5} if "ties" in method else {}
    values: dict[str, Any] = {
        "method": method,
        "models": [{"model": str(path), **density} for path in paths[1:]],
    }
    values |= {"base_model": str(paths[0])} if density else {}
    return parse(MethodMerge, values, origin="bench")


def _write_random(directory: Path, model: Model, *, seed: int) -> int:
    """Write a model of normal values in one file. Returns the bytes of its tensors."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    kinds = {name: (torch.bfloat16, shape) for name, shape in hf_shapes(model).items()}
    header, places = header_of(kinds)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        for place in places.values():
            values = torch.empty(place.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            file.write(raw_bytes(values))
        os.fsync(file.fileno())
    for name, content in written_configs(model, None, dtype=torch.bfloat16, scalar_head=False).items():
        (directory / name).write_bytes(content)
    return sum(place.nbytes for place in places.values())


def _merge(plan: MethodMerge, output: Path) -> None:
    torch.set_num_threads(1)
    merge(plan, output, report=lambda line: None)
