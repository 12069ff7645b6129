"""Measures the steps of `curate` that find duplicates, beside datatrove's MinHash on the same rows."""

import importlib.util
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from megatron_post.bench.curation.datatrove_side import measure_datatrove
from megatron_post.bench.curation.own_side import PartFigures, measure_curation
from megatron_post.bench.curation.workload import Workload, write_workload
from megatron_post.bench.environment import environment
from megatron_post.bench.record import Record, once
from megatron_post.bench.tables import titled
from megatron_post.installation import install_command

_VECTORS = "semantic_duplicates.vectors"


@dataclass(frozen=True)
class CurationFigures:
    """Both sides. dropped: rows that each step drops, and that datatrove would remove."""

    workload: Workload
    processes: int
    own: list[PartFigures]
    datatrove: list[PartFigures]
    dropped: dict[str, int]


def measure_side_by_side(directory: Path, *, rows: int, words: int, processes: int) -> CurationFigures:
    """Measure both sides once, each process with one thread.

    Raises `ValueError` for counts that give no measurement, and if datatrove is not installed.
    """
    if processes < 1:
        raise ValueError(f"--processes {processes}: want at least 1")
    if importlib.util.find_spec("datatrove") is None:
        raise ValueError(
            f"datatrove is not installed, so there is no comparison; run: {install_command('bench')}"
        )
    # numpy, faiss and tqdm read them when their processes start
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    workload = write_workload(directory, count=rows, words=words)
    own = measure_curation(workload, directory, processes=processes)
    report = json.loads((directory / "run" / "report.json").read_text())
    dropped = Counter({step["name"]: step["dropped"] for step in report["steps"]})
    other, removed = measure_datatrove(workload, directory / "datatrove", processes=processes)
    return CurationFigures(workload, processes, own, other, {**dropped, "datatrove": removed})


def curation_table(figures: CurationFigures) -> Table:
    """A table with a row for each part of both sides."""
    table = titled(_subject(figures), ["part", "minutes", "rows/s", "MiB"])
    for part in [*figures.own, *figures.datatrove]:
        speed = figures.workload.count / part.seconds
        table.add_row(_name(part), f"{part.seconds / 60:.2f}", f"{speed:,.0f}", f"{part.peak:,.0f}")
    return table


def curation_record(figures: CurationFigures) -> Record:
    """The record of times and peaks. Each was measured once."""
    found = {}
    for part in [*figures.own, *figures.datatrove]:
        found[f"{_name(part)}: time"] = once("s", part.seconds, "lower")
        found[f"{_name(part)}: peak"] = once("MiB", part.peak, "lower")
    for name, count in figures.dropped.items():
        found[f"{name}: rows dropped"] = once("rows", count)
    workload = figures.workload
    planted = (
        f"planted: {workload.duplicates:,} exact duplicates, {workload.duplicates:,} near duplicates and "
        f"{workload.contaminated:,} contaminated rows"
    )
    settings = {"rows": f"{workload.count:,} of {workload.words} words", "processes": str(figures.processes)}
    return Record("curation", _subject(figures), settings, found, environment(), notes=(planted,))


def _name(part: PartFigures) -> str:
    return f"{part.name} (random)" if part.name == _VECTORS else part.name


def _subject(figures: CurationFigures) -> str:
    workload = figures.workload
    return f"{workload.count:,} rows of {workload.words} words, {figures.processes} processes"
