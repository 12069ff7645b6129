"""The side of Megatron-Post: the trainer as `megatron-post train` builds it."""

import time
from collections.abc import Callable, Iterable
from itertools import islice

from megatron_post.bench.data import one_core
from megatron_post.bench.trl.side import Gate, Input
from megatron_post.bench.trl.workload import Workload, count_tokens, open_train_store
from megatron_post.data.loader import PackLoader
from megatron_post.data.pack import Pack
from megatron_post.data.store import PackStore
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.parts import build_trainer
from megatron_post.train.trainer import Trainer


def train_megatron_post(workload: Workload, gate: Gate) -> None:
    """Run loader, step and report (with JSON lines and TensorBoard) until no more rounds are requested."""
    config = workload.config
    store = open_train_store(config)
    with parallel_run(config.parallel, seed=config.seed) as topology:
        trainer, _ = build_trainer(config, topology)
        is_wanted = gate.ready(_input(trainer, store, workload))
        with _loader(store, workload) as loader:
            run_rounds(trainer, loader, gate, is_wanted=is_wanted, count=count_tokens)


def run_rounds(
    trainer: Trainer,
    loader: Iterable[list[Pack]],
    gate: Gate,
    *,
    is_wanted: bool,
    count: Callable[[list[Pack]], tuple[int, int]],
) -> None:
    """Train and report until no more rounds are requested.

    is_wanted: whether a first round is requested. count: gives the real tokens of packs, and how many tokens
    or pairs in them are trained.
    """
    for step, packs in enumerate(loader, start=1):
        if not is_wanted:
            break
        started = time.perf_counter()
        values = trainer.step(packs)
        trainer.report(step, values, packs, seconds=time.perf_counter() - started)
        tokens, trained = count(packs)
        is_wanted = gate.step(tokens=tokens, trained=trained, loss=values["loss"])


def _loader(store: PackStore, workload: Workload) -> PackLoader:
    return PackLoader(store, seed=workload.config.seed, global_batch=workload.config.train.global_batch)


def _input(trainer: Trainer, store: PackStore, workload: Workload, *, steps: int = 100) -> Input:
    tokens = capacity = 0
    with one_core(), _loader(store, workload) as loader:
        started = time.perf_counter()
        for packs in islice(loader, steps):
            for pack in packs:
                trainer.stepper.prepare(pack)
            tokens, capacity = (
                tokens + count_tokens(packs)[0],
                capacity + sum(len(pack.tokens) for pack in packs),
            )
        seconds = time.perf_counter() - started
    return Input(fill=tokens / capacity, collated_per_second=tokens / seconds)
