"""Faults inside a rank. The rank calls one of these functions before it runs the command."""

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_post.data.batch import PackedBatch
from megatron_post.data.loader import PackLoader
from megatron_post.data.pack import Pack
from megatron_post.stages.base import Metrics
from megatron_post.stages.sft import SFT
from megatron_post.train.checkpoint import Position
from megatron_post.train.trainer import Trainer

BAD_STEP, BAD_MICROBATCH = 5, 1
_loss = SFT.loss
_next = PackLoader.__next__
_advance = Trainer.advance


def nan_loss() -> None:
    """Make the loss of one microbatch of step 5 NaN on rank 1."""
    _spoil_loss(lambda value: value * float("nan"))


def nan_gradient() -> None:
    """Make the gradient of one microbatch of step 5 NaN on rank 1, with a finite loss.

    This also happens whenever the microbatch is repeated.
    """
    _spoil_loss(_NaNGradient.apply)


def slow_steps() -> None:
    """From the third step on, loading data takes 5 s."""
    taken = itertools.count(1)

    def taking(self: PackLoader) -> Any:
        if next(taken) >= 3:
            time.sleep(5)
        return _next(self)

    PackLoader.__next__ = taking  # type: ignore[method-assign]


def write_samples(directory: Path) -> None:
    """Each process writes the units of its packs into a file in `directory`, one line for each step."""

    def taking(self: PackLoader) -> Any:
        packs = _next(self)
        units = [str(unit) for pack in packs for unit in pack.unit_ids.tolist() if unit >= 0]
        with (directory / f"{os.getpid()}").open("a") as file:
            file.write(" ".join(units) + "\n")
        return packs

    PackLoader.__next__ = taking  # type: ignore[method-assign]


def record_history(directory: Path, start: int) -> None:
    """Each process writes the units it has trained on, one JSON line for each step that changed the weights.

    start: the number of this start of the run. A line is written before the step can be in a checkpoint. Of
    the ranks that train on the same packs, only one writes.
    """
    file = os.open(directory / f"{start:04d}-{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def advancing(self: Trainer, position: Position, packs: list[Pack]) -> dict[str, float] | None:
        values = _advance(self, position, packs)
        place = self.topology
        if values is not None and place.tensor_rank == place.pipeline_rank == place.context_rank == 0:
            units = [unit for pack in packs for unit in pack.unit_ids.tolist() if unit >= 0]
            os.write(file, f"{json.dumps({'step': position.step + 1, 'units': units})}\n".encode())
        return values

    Trainer.advance = advancing  # type: ignore[method-assign]


class _NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


def _spoil_loss(spoil: Any) -> None:
    if os.environ["RANK"] != "1":
        return
    seen: dict[bytes, int] = {}  # microbatches by content, so that a repeated one has the same number

    def loss(self: SFT, output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Metrics]:
        number = seen.setdefault(batch.tokens.numpy().tobytes(), len(seen))
        value, count, metrics = _loss(self, output, batch)
        if number == (BAD_STEP - 1) * 2 + BAD_MICROBATCH:
            value = spoil(value)
            metrics = {**metrics, "loss": (value.detach(), count)}
        return value, count, metrics

    SFT.loss = loss  # type: ignore[method-assign]
