"""The page: take packs, forward and backward, step the optimizer, report, maybe evaluate, maybe save."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_post.config.schema import Config
from megatron_post.data.store import Pack
from megatron_post.parallel.topology import Topology
from megatron_post.train.checkpoint import Checkpoints, Position
from megatron_post.train.metrics import MetricsWriter, model_flops, peak_flops, train_line
from megatron_post.train.optimizer import optimizer_step
from megatron_post.train.step import Stepper


class Trainer:
    """A training run over its parts, which `train.run` builds."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        *,
        chunks: list[Any],
        stepper: Stepper,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        checkpoints: Checkpoints,
        metrics: MetricsWriter,
    ) -> None:
        self.config, self.topology, self.chunks, self.stepper = config, topology, chunks, stepper
        self.optimizer, self.scheduler = optimizer, scheduler
        self.checkpoints, self.metrics = checkpoints, metrics

    def fit(self, train: Iterator[list[Pack]], held_out: Sequence[Pack], *, start: Position) -> None:
        """Train from `start` to the last step of the config.

        train: this rank's packs, one list an optimizer step. held_out: this rank's evaluation packs, of equal
        number on every data-parallel rank.
        """
        steps, position = self.config.train.steps, start
        while position.step < steps:
            packs = next(train)
            started = time.perf_counter()
            values = self.step(packs)
            position = position.after(self.config.train.global_batch)
            step = position.step
            self.report(step, values, packs, seconds=time.perf_counter() - started)
            if held_out and (step == steps or _due(step, self.config.train.eval_every)):
                self.evaluate(step, held_out)
            if step == steps or _due(step, self.config.checkpoint.every):
                self.checkpoints.save(position, self.chunks, self.optimizer, self.scheduler)

    def step(self, packs: list[Pack]) -> dict[str, float]:
        """One optimizer step. Returns the stage's metrics (on the last pipeline stage), gradient norm and
        rate."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self.stepper(packs)
        rate = self.optimizer.param_groups[0]["lr"]
        norm = optimizer_step(self.optimizer)
        self.scheduler.step(increment=1)
        return {**_means(sums), "grad_norm": norm, "lr": rate}

    @torch.no_grad()
    def evaluate(self, step: int, packs: Sequence[Pack]) -> None:
        """Mean metrics over the held-out packs."""
        for chunk in self.chunks:
            chunk.eval()
        sums = self.stepper(packs, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        values = _means(sums)
        self.metrics.write("eval", step, values)
        self.metrics.console(
            f"step {step}  held out: " + "  ".join(f"{k} {v:.4f}" for k, v in values.items())
        )

    def report(self, step: int, values: dict[str, float], packs: Iterable[Pack], *, seconds: float) -> None:
        """Throughput counts real tokens, never padding; FLOPs count the squares of the segments."""
        tokens, squares = self._global_cost(packs)
        flops = model_flops(self.config.model, tokens=tokens, squared_lengths=squares) / seconds
        values |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        if self.topology.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name())
            values["tflops_per_gpu"] = flops / self.topology.world_size / 1e12
            if peak:
                values["mfu"] = flops / self.topology.world_size / peak
        if "loss" not in values:
            return
        self.metrics.write("train", step, values)
        if _due(step, self.config.train.log_every) or step == self.config.train.steps:
            self.metrics.console(train_line(step, self.config.train.steps, values))

    def _global_cost(self, packs: Iterable[Pack]) -> tuple[float, float]:
        lengths = np.concatenate([pack.lengths for pack in packs]).astype(np.float64)
        totals = torch.tensor([lengths.sum(), (lengths**2).sum()], device=self.topology.device)
        torch.distributed.all_reduce(totals, group=self.topology.groups.dp)
        return totals[0].item(), totals[1].item()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _means(sums: dict[str, float]) -> dict[str, float]:
    """name -> sum / count; a metric without a single count is left out rather than reported as a number."""
    names = [name for name in sums if not name.endswith("_count")]
    return {name: sums[name] / sums[f"{name}_count"] for name in names if sums[f"{name}_count"] > 0}
