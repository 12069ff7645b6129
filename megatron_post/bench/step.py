"""Times steps of the real trainer in any layout, with its data loading and its reports.

Nothing is written to `run_dir`.
"""

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
from megatron_post.train.inputs import check_run, open_loader, open_stores, rank_errors
from megatron_post.train.parts import build_trainer, joined_ranks, make_stage
from megatron_post.train.reference import attach_reference
from megatron_post.train.trainer import Trainer

# A synthetic store holds at most this many random tokens. Longer runs repeat it.
STORE_TOKENS = 2**24


@dataclass(frozen=True)
class TimedStep:
    """One optimizer step on one rank: wall seconds, seconds of its sections, and the counts of its packs."""

    seconds: float
    phases: dict[str, float]
    counts: Counts

    @property
    def own(self) -> float:
        """Seconds before ranks meet to reduce gradients.

        Waiting for tensor- and pipeline-parallel ranks is included.
        """
        return self.phases["data"] + self.phases["forward and backward"]


@dataclass(frozen=True)
class Rank:
    """The measurement of one rank. memory: peak bytes on the GPU, or of the process if there is no GPU."""

    rank: int
    counts_packs: bool
    steps: tuple[TimedStep, ...]
    memory: int


@dataclass(frozen=True)
class Measured:
    """A measurement, on the one rank that reports it. ranks: in order."""

    config: Config
    data: str
    notes: tuple[str, ...]
    ranks: tuple[Rank, ...]
    data_size: int


def measure_steps(config: Config, *, steps: int, warmup: int) -> Measured | None:
    """Run `warmup` steps and then `steps` steps that are measured. Returns None on ranks that do not report.

    The run trains on the config's store if it exists. Otherwise it trains random weights on random tokens in
    a temporary directory. Raises `ValueError` for counts that give no measurement, and `ConfigError` for a
    config that cannot run.
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
                    taken.append(
                        TimedStep(
                            seconds, phases, count_packs(packs, stage, scalar_head=run.traits.scalar_head)
                        )
                    )
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
    """Do a step as `Trainer.fit` does. Returns its wall seconds on this rank, and its packs.

    The guard's heartbeat has the seconds of its sections.
    """
    began = time.perf_counter()
    trainer.guard.begin(number, "data")
    packs = next(loader)
    values = trainer.step(packs)
    trainer.guard.enter("report")
    trainer.report(number, values, packs, seconds=trainer.guard.elapsed())
    trainer.guard.enter("end")
    if trainer.topology.device.type == "cuda":
        torch.cuda.synchronize()  # kernels run asynchronously, and the last ones may still run
    return time.perf_counter() - began, packs


@contextlib.contextmanager
def prepared(config: Config, *, packs: int) -> Iterator[tuple[Config, Topology, PackStore, tuple[str, ...]]]:
    """Prepare a run for the time of this context.

    Yields the config with a temporary run directory, the topology, a store, and notes about what differs from
    the real run. Raises `ConfigError` for a config that cannot run.
    """
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
    """A store of random tokens. One rank of each node writes it, and all nodes write the same."""
    _, _, local_rank = rank_from_environment()
    if local_rank == 0:
        batch, longest = config.train.global_batch, STORE_TOKENS // config.data.pack_length
        write_synthetic(directory, config, packs=max(batch, min(packs, longest)))
    torch.distributed.barrier()  # no rank may open the store before it is written
    return open_synthetic(directory, config)


def _with_random_weights(config: Config) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"init_from": None})})


def _without_held_out(config: Config) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"eval_sources": ()})})


@contextlib.contextmanager
def scratch(topology: Topology, parent: str | Path | None = None) -> Iterator[Path]:
    """A temporary directory with the same name on all ranks. It is removed when this context ends.

    parent: the directory that holds it. By default the system's temporary directory.
    """
    name: list[Any] = [None]
    if topology.rank == 0:
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        name = [tempfile.mkdtemp(prefix="megatron-post-bench-", dir=parent)]
    torch.distributed.broadcast_object_list(name, src=0)
    # Other nodes may have a file system of their own, so every rank makes the directory.
    directory = Path(name[0])
    directory.mkdir(exist_ok=True)
    try:
        yield directory
        torch.distributed.barrier()  # no rank may remove files that another rank still reads
    finally:
        shutil.rmtree(directory, ignore_errors=True)
