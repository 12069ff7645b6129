"""Figures of packing and loading on one core."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_post.data.assembly import assemble
from megatron_post.data.loader import PackLoader
from megatron_post.data.packing import pack_units
from megatron_post.data.store import PackStore, SourceCounts, StoreSettings, open_store
from megatron_post.data.store_writer import StoreWriter
from megatron_post.data.template import Rendered, TokenRole
from megatron_post.data.units import UnitPile

# Share of examples in percent and mean tokens, by source: the SFT mix of "The Llama 3 Herd of Models".
LLAMA3_MIX = (
    (52.66, 974.0), (14.89, 753.3), (3.01, 520.5), (8.14, 297.8), (21.19, 661.6), (0.11, 38135.6)
)  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """Seconds to place `units` in packs, and the share of the packs that is filled."""

    units: int
    packs: int
    seconds: float
    fill: float


def long_tailed_lengths(count: int, *, capacity: int, seed: int = 0) -> np.ndarray:
    """int64 [count]: log-normal (sigma 1) about the mean length of each source of Llama 3's SFT mix.

    The longest are cut to `capacity`. The mean of a log-normal is exp(mu + sigma^2 / 2).
    """
    draw = np.random.default_rng(seed)
    shares, means = np.array(LLAMA3_MIX).T
    mu = np.log(means) - 0.5
    source = draw.choice(len(shares), size=count, p=shares / shares.sum())
    return np.clip(draw.lognormal(mu[source], 1.0), 8, capacity).astype(np.int64)


def time_packing(lengths: np.ndarray, *, capacity: int) -> Packed:
    """Pack on one core, once."""
    with one_core():
        started = time.perf_counter()
        packing = pack_units(lengths, capacity=capacity)
        seconds = time.perf_counter() - started
    return Packed(len(lengths), len(packing), seconds, int(lengths.sum()) / (len(packing) * capacity))


def time_loader(directory: Path, *, pack_length: int, tokens: int) -> float:
    """Real tokens a second that a loader hands out on one core, over one epoch in shuffled order.

    The store of about `tokens` tokens has just been written: the page cache holds it.
    """
    store = _write_store(directory, pack_length=pack_length, tokens=tokens)
    real = 0
    with one_core(), PackLoader(store, seed=1, global_batch=1) as loader:
        started = time.perf_counter()
        for packs in islice(loader, len(store)):
            real += sum(int(pack.lengths.sum()) for pack in packs)
        return real / (time.perf_counter() - started)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep the threads of this process to one core, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    _pin(threads, {min(allowed)})
    try:
        yield
    finally:
        _pin(threads, allowed)


def _pin(threads: list[int], cores: set[int]) -> None:
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cores)


def _write_store(directory: Path, *, pack_length: int, tokens: int) -> PackStore:
    """Random dialogs of the lengths of `long_tailed_lengths`, `tokens` in all, packed as `data pack` does."""
    draw, pile = np.random.default_rng(0), UnitPile()
    mean = sum(share * length for share, length in LLAMA3_MIX) / sum(share for share, _ in LLAMA3_MIX)
    for sample, length in enumerate(long_tailed_lengths(int(tokens / mean), capacity=pack_length)):
        dialog = Rendered(
            draw.integers(0, 128256, length, dtype=np.int32), np.full(length, TokenRole.BODY, np.uint8)
        )
        pile.add([dialog], source=0, sample=sample, turns=1)
    settings = StoreSettings(
        pack_length=pack_length, segment_multiple=1, tokenizer_fingerprint="bench", pad_id=0, seed=0
    )
    assembly = assemble(pile.units(), np.arange(len(pile)), "train", settings)
    with StoreWriter(directory, settings) as writer:
        writer.write(
            "train",
            sources=[SourceCounts("random", rows=len(pile))],
            columns=assembly.columns(),
            segments_per_pack=np.diff(assembly.segment_ends),
            packs=assembly.packs(),
        )
    return open_store(directory, "train")
