"""Measures packing and loading on one core."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_post.bench.environment import environment
from megatron_post.bench.record import Figure, Record, once
from megatron_post.bench.synthetic import MEAN_LENGTH, long_tailed_lengths, write_random_store
from megatron_post.data.loader import PackLoader
from megatron_post.data.packing import pack_units
from megatron_post.data.store import PackStore
from megatron_post.data.store_format import StoreSettings

CAPACITY = 131072
LENGTHS = 1_000_000
LOADED = {8192: 2**25, CAPACITY: 2**25}  # pack length -> tokens of the store


@dataclass(frozen=True)
class Packed:
    """Seconds to assign `units` units to packs, and the share of the packs that is filled."""

    units: int
    packs: int
    seconds: float
    fill: float


def measure_data(*, rounds: int) -> Record:
    """Measure packing and loading in turn, `rounds` times. Raises `ValueError` for less than one round."""
    if rounds < 1:
        raise ValueError(f"--rounds {rounds}: want at least 1")
    lengths = long_tailed_lengths(LENGTHS, capacity=CAPACITY)
    packed, loaded = [], []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(rounds):
            packed.append(time_packing(lengths, capacity=CAPACITY))
            loaded.append(
                {
                    length: time_loader(
                        Path(directory, f"{length}-{number}"), pack_length=length, tokens=tokens
                    )
                    for length, tokens in LOADED.items()
                }
            )
    return Record(
        benchmark="data",
        subject="packing and loading",
        settings={"cores": "1", "rounds": str(rounds)},
        figures=data_figures(packed, loaded),
        environment=environment(),
        notes=(
            "lengths as in Llama 3's SFT mix",
            "the loader's store has just been written, so it is read from the page cache",
        ),
    )


def data_figures(packed: Sequence[Packed], loaded: Sequence[dict[int, float]]) -> dict[str, Figure]:
    """The figures of all rounds. loaded: for each round, tokens/s by pack length."""
    one = packed[0]
    loaders = {
        f"loader, packs of {length:,}": Figure(
            "tokens/s", tuple(round_[length] for round_ in loaded), "higher"
        )
        for length in loaded[0]
    }
    return {
        f"packing {one.units:,} lengths": Figure("s", tuple(p.seconds for p in packed), "lower"),
        f"fill of the {one.packs:,} packs": once("%", 100 * one.fill, "higher"),
        **loaders,
    }


def time_packing(lengths: np.ndarray, *, capacity: int) -> Packed:
    """Pack once on one core."""
    with one_core():
        started = time.perf_counter()
        packs = pack_units(lengths, capacity=capacity)
        seconds = time.perf_counter() - started
    return Packed(len(lengths), len(packs), seconds, int(lengths.sum()) / (len(packs) * capacity))


def time_loader(directory: Path, *, pack_length: int, tokens: int) -> float:
    """Real tokens per second that a loader yields on one core, over one epoch in shuffled order.

    The store of about `tokens` tokens has just been written, so it is read from the page cache.
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
    """Keep the threads of this process on one core, if the system supports that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    # Threads that start later inherit this from the thread that starts them.
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
    """A store of random dialogs with the lengths of `long_tailed_lengths`, about `tokens` tokens in all."""
    settings = StoreSettings(
        pack_length=pack_length, segment_multiple=1, tokenizer_fingerprint="bench", pad_id=0, seed=0
    )
    lengths = long_tailed_lengths(int(tokens / MEAN_LENGTH), capacity=pack_length)
    return write_random_store(directory, settings, lengths, vocab_size=128256)
