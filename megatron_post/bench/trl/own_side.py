"""The side of Megatron-Post: the trainer as `megatron-post train` builds it."""

import time
from itertools import islice

from megatron_post.bench.data import one_core
from megatron_post.bench.trl.side import Gate, Input
from megatron_post.bench.trl.workload import Workload, count_tokens, open_train_store
from megatron_post.data.loader import PackLoader
from megatron_post.data.store import PackStore
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.run import build_trainer
from megatron_post.train.trainer import Trainer


def train_megatron_post(workload: Workload, gate: Gate) -> None:
    """Run loader, step and report (with JSON lines and TensorBoard) until no more rounds are requested."""
    config = workload.config
    store = open_train_store(config)
    with parallel_run(config.parallel, seed=config.seed) as topology:
        trainer, _ = build_trainer(config, topology)
        is_wanted = gate.ready(_input(trainer, store, workload))
        with _loader(store, workload) as loader:
            for step, packs in enumerate(loader, start=1):
                if not is_wanted:
                    break
                started = time.perf_counter()
                values = trainer.step(packs)
                trainer.report(step, values, packs, seconds=time.perf_counter() - started)
                tokens, trained = count_tokens(packs)
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
