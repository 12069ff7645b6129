"""Steps of the real trainer, timed: its own parts, data, report and all, in any layout, without a trace in
`run_dir`."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_post.bench.accounting import Counts, count_packs
from megatron_post.bench.memory import peak_memory
from megatron_post.bench.synthetic import open_synthetic, write_synthetic
from megatron_post.config.load import raise_for
from megatron_post.config.schema import Config
from megatron_post.data.pack import Pack
from megatron_post.data.store import PackStore
from megatron_post.parallel.environment import rank_from_environment
from megatron_post.parallel.topology import Topology
from megatron_post.train.checkpoint import Position
from megatron_post.train.reference import attach_reference
from megatron_post.train.run import (
    build_trainer,
    check_run,
    joined_ranks,
    make_stage,
    open_loader,
    open_stores,
    rank_errors,
)
from megatron_post.train.trainer import Trainer

# Random tokens that a synthetic store holds at most; it is gone through again after that.
STORE_TOKENS = 2**24


@dataclass(frozen=True)
class Step:
    """One optimizer step on one rank: wall seconds, those of its sections, and what its packs held."""

    seconds: float
    phases: dict[str, float]
    counts: Counts

    @property
    def own(self) -> float:
        """Seconds before ranks meet to reduce gradients; inside, tensor- and pipeline-parallel ones do
        wait."""
        return self.phases["data"] + self.phases["forward and backward"]


@dataclass(frozen=True)
class Rank:
    """What one rank measured. memory: most bytes on the GPU, or of the process where there is none."""

    rank: int
    counts_packs: bool
    steps: tuple[Step, ...]
    memory: int


@dataclass(frozen=True)
class Measured:
    """A measurement, on the one rank that reports it. ranks: by number."""

    config: Config
    data: str
    notes: tuple[str, ...]
    ranks: tuple[Rank, ...]
    data_size: int


def measure_steps(config: Config, *, steps: int, warmup: int) -> Measured | None:
    """Run `warmup` steps that are not counted and `steps` that are. Returns None on ranks that do not report.

    Trains on the config's store where there is one, else on random tokens in a temporary directory, from
    random weights. Raises `ValueError` for counts that make no measurement, `ConfigError` for what cannot
    run.
    """
    if steps < 1 or warmup < 0:
        raise ValueError(
            f"--steps {steps} --warmup {warmup}: want at least 1 step to measure, and 0 to warm up"
        )
    with prepared(config, packs=config.train.global_batch * (steps + warmup)) as (
        run,
        topology,
        store,
        notes,
    ):
        trainer, _ = build_trainer(run, topology)
        stage, taken = make_stage(run, topology), []
        with open_loader(run, store, topology, Position()) as loader:
            for number in range(1, warmup + steps + 1):
                if number == warmup + 1 and topology.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                seconds, packs = timed_step(trainer, loader, number)
                if number > warmup:
                    phases = trainer.guard.heartbeat.seconds()
                    taken.append(Step(seconds, phases, count_packs(packs, stage)))
        trainer.metrics.close()
        first = topology.tensor_rank == topology.context_rank == topology.pipeline_rank == 0
        own = Rank(topology.rank, first, tuple(taken), peak_memory(topology.device))
        ranks: list[Any] = [None] * topology.world_size
        torch.distributed.all_gather_object(ranks, own)
        if not topology.is_reporter:
            return None
        return Measured(
            config, f"{len(store)} packs of {store.sources[0].name}", notes, tuple(ranks), topology.data_size
        )


def timed_step(trainer: Trainer, loader: Iterator[list[Pack]], number: int) -> tuple[float, list[Pack]]:
    """What `Trainer.fit` does for a step, and its wall seconds on this rank.

    The heartbeat has its sections.
    """
    began = time.perf_counter()
    trainer.guard.begin(number, "data")
    packs = next(loader)
    values = trainer.step(packs)
    trainer.guard.enter("report")
    trainer.report(number, values, packs, seconds=trainer.guard.elapsed())
    trainer.guard.enter("end")
    if trainer.topology.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, packs


@contextlib.contextmanager
def prepared(config: Config, *, packs: int) -> Iterator[tuple[Config, Topology, PackStore, tuple[str, ...]]]:
    """Within this context: the config with a run directory that is removed, this rank, a store, and what
    differs from the real run. Raises `ConfigError` for what cannot run."""
    tokenizer = check_run(config) if Path(config.data.store).exists() else None
    if tokenizer is None:
        raise_for(rank_errors(config, world_size=rank_from_environment()[1]))
    with joined_ranks(config) as topology, scratch(topology) as directory:
        train = config.train.model_copy(update={"log_every": 10**9})
        run = config.model_copy(update={"run_dir": str(directory / "run"), "train": train})
        notes = []
        if tokenizer is not None:
            if config.model.init_from is not None and not Path(config.model.init_from).exists():
                run = _with_random_weights(run)
                notes.append(f"random weights: {config.model.init_from} does not exist")
            store, _ = open_stores(_without_held_out(run), tokenizer)
            attach_reference(run, topology, [store])
        else:
            run = _with_random_weights(run)
            notes.append(
                f"synthetic: data.store={config.data.store} does not exist, so random tokens and weights; "
                "lengths are log-normal about the means of Llama 3's SFT mix"
            )
            store = _synthetic_store(directory / "store", run, topology, packs=packs)
        yield run, topology, store, tuple(notes)


def _synthetic_store(directory: Path, config: Config, topology: Topology, *, packs: int) -> PackStore:
    """Written by one rank of each node, alike."""
    _, _, local_rank = rank_from_environment()
    if local_rank == 0:
        batch, longest = config.train.global_batch, STORE_TOKENS // config.data.pack_length
        write_synthetic(directory, config, packs=max(batch, min(packs, longest)))
    torch.distributed.barrier()
    return open_synthetic(directory, config)


def _with_random_weights(config: Config) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"init_from": None})})


def _without_held_out(config: Config) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"eval_sources": ()})})


@contextlib.contextmanager
def scratch(topology: Topology, parent: str | Path | None = None) -> Iterator[Path]:
    """A directory of one name on all ranks, in `parent` or where temporary files go, for as long as this
    context lasts."""
    name: list[Any] = [None]
    if topology.rank == 0:
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        name = [tempfile.mkdtemp(prefix="megatron-post-bench-", dir=parent)]
    torch.distributed.broadcast_object_list(name, src=0)
    directory = Path(name[0])
    directory.mkdir(exist_ok=True)
    try:
        yield directory
        torch.distributed.barrier()  # nobody still reads
    finally:
        shutil.rmtree(directory, ignore_errors=True)
