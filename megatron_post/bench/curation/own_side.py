"""Runs `curate` in processes of its own, and notes the time and the peak memory of each part of the run."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np

from megatron_post.bench.curation.workload import Workload
from megatron_post.bench.memory import peak_rss, reset_peak
from megatron_post.config.load import parse
from megatron_post.curation.duplicates.words import Dialog, hash_of
from megatron_post.curation.run import curate
from megatron_post.curation.settings import Curation
from megatron_post.display import make_console

_DIMENSIONS = 384
Made = TypeVar("Made")


@dataclass(frozen=True)
class PartFigures:
    """One part of a run: wall seconds, and MiB of the largest process."""

    name: str
    seconds: float
    peak: float


def measure_curation(workload: Workload, directory: Path, *, processes: int) -> list[PartFigures]:
    """The parts of a run over a workload, in their order. Random vectors stand in for embeddings."""
    exam = {"name": "exam", "path": str(workload.evaluation)}
    settings = {
        "run": str(directory / "run"),
        "sources": [{"name": "rows", "path": str(workload.rows)}],
        "steps": [
            {"kind": "contamination", "evaluations": [exam]},
            {"kind": "exact_duplicates"},
            {"kind": "near_duplicates"},
            {"kind": "semantic_duplicates"},
        ],
    }
    found = in_processes(_curate, [(settings, rank, processes) for rank in range(processes)])
    # A process that waits while another one reads the sources does not begin this part itself.
    longest = max(found, key=len)
    names = list(dict.fromkeys(part.name for own in [longest, *found] for part in own))
    return [slowest(name, [part for own in found for part in own if part.name == name]) for name in names]


def slowest(name: str, parts: Sequence[PartFigures]) -> PartFigures:
    """The most seconds and the largest peak of the processes of a part."""
    return PartFigures(name, max(part.seconds for part in parts), max(part.peak for part in parts))


def _curate(settings: dict[str, Any], rank: int, size: int) -> list[PartFigures]:
    """The parts of a run in this process."""
    clock = _Clock()
    with mock.patch("megatron_post.curation.duplicates.semantic_step.Encoder", RandomVectors):
        curate(
            parse(Curation, settings, origin="bench"),
            rank=rank,
            size=size,
            console=make_console(quiet=True),
            begins=clock.begin,
        )
    clock.begin("")
    return clock.parts


class _Clock:
    """Notes the time and the peak memory of each part of a run."""

    def __init__(self) -> None:
        self.parts: list[PartFigures] = []
        self._name, self._start = "", 0.0

    def begin(self, name: str) -> None:
        """End the part before this one, if there is one."""
        if self._name:
            seconds = time.perf_counter() - self._start
            self.parts.append(PartFigures(self._name, seconds, peak_rss() / 2**20))
        reset_peak()
        self._name, self._start = name, time.perf_counter()


def in_processes(function: Callable[..., Made], arguments: Sequence[tuple[Any, ...]]) -> list[Made]:
    """Call a function in a new process each time, and return its results."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(arguments), mp_context=context, max_tasks_per_child=1) as pool:
        return [future.result() for future in [pool.submit(function, *each) for each in arguments]]


class RandomVectors:
    """Stands in for an encoder. Dialogs with the same beginning have the same vector."""

    def __init__(self, *args: object, **settings: object) -> None:
        pass

    def encode(self, dialogs: Sequence[Dialog]) -> np.ndarray:
        """Unit vectors, float16 [rows, 384]."""
        seeds = [hash_of([text[:100] for _, text in dialog[:1]]) for dialog in dialogs]
        vectors = np.stack([np.random.default_rng(seed).standard_normal(_DIMENSIONS) for seed in seeds])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
