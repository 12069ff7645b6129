"""Measures the time that saving costs a run, with synchronous and asynchronous checkpoints in turn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_post.bench.environment import environment
from megatron_post.bench.record import Figure, Record, once
from megatron_post.bench.step import prepared, scratch, timed_step
from megatron_post.bench.step_figures import model_settings
from megatron_post.config.load import validate
from megatron_post.config.schema import Config
from megatron_post.data.store import PackStore
from megatron_post.parallel.topology import Topology
from megatron_post.plan.estimate import layout_line
from megatron_post.storage import manifest
from megatron_post.train.checkpoint import Checkpoints, Position
from megatron_post.train.fence import claim_together
from megatron_post.train.inputs import open_loader
from megatron_post.train.parts import build_trainer
from megatron_post.train.trainer import Trainer

MODES = ("synchronous", "asynchronous")


@dataclass(frozen=True)
class Interval:
    """One save and the steps until the next save.

    stalled: seconds for which the save held up training. first: seconds of the step after it. others: seconds
    of the steps that follow.
    """

    mode: str
    stalled: float
    first: float
    others: tuple[float, ...]


def default_config() -> Config:
    """A model of 56 million parameters in fp32.

    A checkpoint has 0.85 GB with Adam's moments and master weights.
    """
    model = {"num_layers": 12, "hidden_size": 640, "ffn_hidden_size": 1760, "num_attention_heads": 10,
             "num_key_value_heads": 5, "vocab_size": 512}  # fmt: skip
    return validate(
        {
            "run_dir": "unused",
            "model": {"preset": "tiny", **model},
            "tokenizer": {"path": "unused"},
            "data": {"store": "unused", "pack_length": 128},
            "precision": {"dtype": "fp32"},
            "train": {"steps": 10**6, "global_batch": 4},
        },
        origin="bench checkpoint",
    )


def measure_checkpoints(
    config: Config, *, subject: str, directory: str, saves: int, every: int, rounds: int
) -> Record | None:
    """Measure `saves` saves of each kind in each round, `every` steps apart.

    Returns None on ranks that do not report. Checkpoints are written to a temporary directory in `directory`,
    which all ranks must see. Raises `ValueError` for counts that give no measurement.
    """
    if min(saves, every, rounds) < 1:
        raise ValueError(f"--saves {saves} --every {every} --rounds {rounds}: want at least 1 of each")
    packs = config.train.global_batch * every * (saves + 1)
    with (
        prepared(config, packs=packs) as (run, topology, store, notes),
        scratch(topology, directory) as disk,
    ):
        trainer, _ = build_trainer(run, topology)
        found, size = [], 0
        for number in range(rounds):
            for mode in MODES:
                path = disk / f"{mode}-{number}"
                trainer.checkpoints = checkpoints_in(run, topology, path, asynchronous=mode == MODES[1])
                found += _intervals(trainer, store, mode, saves=saves, every=every)
                trainer.checkpoints.wait()  # an asynchronous save may still be writing
                size = _bytes(trainer.checkpoints.root)
        trainer.metrics.close()
        ranks: list[Any] = [None] * topology.world_size
        torch.distributed.all_gather_object(ranks, found)
        if not topology.is_reporter:
            return None
        layout = layout_line(config, topology.data_size).replace("one GPU", "one rank")
        return Record(
            benchmark="checkpoint",
            subject=subject,
            settings={
                **model_settings(config),
                "layout": layout,
                "saves": f"{saves} of each kind in turn, {every} steps apart, {rounds} time(s)",
                "directory": directory,
            },
            figures=figures(ranks, size=size),
            environment=environment(),
            notes=(
                *notes,
                "the time held up is spent in `save`: it copies the state before the optimizer changes it, "
                "and waits for the save before",
            ),
        )


def figures(ranks: list[list[Interval]], *, size: int) -> dict[str, Figure]:
    """The figures of all saves, from the intervals of each rank. `size` is a checkpoint's bytes.

    For each save the rank that waited longest counts.
    """
    worst = [
        Interval(
            mode=same[0].mode,
            stalled=max(each.stalled for each in same),
            first=max(each.first for each in same),
            others=tuple(max(seconds) for seconds in zip(*(each.others for each in same), strict=True)),
        )
        for same in zip(*ranks, strict=True)
    ]
    stalls = {mode: tuple(i.stalled for i in worst if i.mode == mode) for mode in MODES}
    calm = tuple(seconds for i in worst for seconds in i.others)
    found = {f"held up by a save, {mode}": Figure("s", stalls[mode], "lower") for mode in MODES}
    synchronous, asynchronous = (found[f"held up by a save, {mode}"].median for mode in MODES)
    found["asynchronous / synchronous"] = once("%", 100 * asynchronous / synchronous, "lower")
    for mode in MODES:
        beside = tuple(i.first for i in worst if i.mode == mode)
        found[f"step behind a save, {mode}"] = Figure("s", beside, "lower")
    if calm:
        found["other steps"] = Figure("s", calm, "lower")
    return found | {"checkpoint": once("GB", size / 1e9)}


def checkpoints_in(config: Config, topology: Topology, directory: Path, *, asynchronous: bool) -> Checkpoints:
    """Checkpoints of a run in another directory, synchronous or asynchronous."""
    checkpoint = config.checkpoint.model_copy(update={"asynchronous": asynchronous, "keep": 1})
    config = config.model_copy(update={"run_dir": str(directory), "checkpoint": checkpoint})
    return Checkpoints(config, topology, claim_together(directory, topology))


def _intervals(trainer: Trainer, store: PackStore, mode: str, *, saves: int, every: int) -> list[Interval]:
    """Run steps to warm up, and then saves with steps between them."""
    found, position = [], Position()
    with open_loader(trainer.config, store, trainer.topology, position) as loader:
        for number in range(saves + 1):
            before = trainer.checkpoints.stalled
            if number:
                trainer.save(position)
            seconds = []
            for _ in range(every):
                seconds.append(timed_step(trainer, loader, position.step + 1)[0])
                position = position.after(trainer.config.train.global_batch)
            if number:
                stalled = trainer.checkpoints.stalled - before
                found.append(Interval(mode, stalled, seconds[0], tuple(seconds[1:])))
    return found


def _bytes(root: Path) -> int:
    """Bytes of the newest checkpoint."""
    newest = manifest.step_directory(root, manifest.published_steps(root)[-1])
    return sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
