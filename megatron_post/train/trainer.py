"""The training loop: take packs, run forward and backward, step the optimizer, report, evaluate, save."""

import math
import resource
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_post.config.layout import store_layout
from megatron_post.config.schema import Config
from megatron_post.data.balance import attended
from megatron_post.data.pack import Pack
from megatron_post.parallel.topology import Topology
from megatron_post.plan.flops import Load, step_flops
from megatron_post.plan.hardware import GIB, gpu_of_device
from megatron_post.train.callbacks import Callback
from megatron_post.train.checkpoint import Checkpoints, Position
from megatron_post.train.guard import Guard
from megatron_post.train.health import NotFinite, name_places, not_finite
from megatron_post.train.metrics import MetricsWriter
from megatron_post.train.optimizer import gradient_norm
from megatron_post.train.signals import Requeue
from megatron_post.train.step import Stepper

# A save may take this many times the deadline of a step before the watchdog ends the run.
PATIENCE = 4.0


class Trainer:
    """A training run. `train.parts` builds its parts."""

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
        guard: Guard,
        callbacks: Sequence[Callback],
    ) -> None:
        self.config, self.topology, self.chunks, self.stepper = config, topology, chunks, stepper
        self.optimizer, self.scheduler = optimizer, scheduler
        self.checkpoints, self.metrics, self.guard = checkpoints, metrics, guard
        self.callbacks = callbacks

    def fit(self, train: Iterator[list[Pack]], held_out: Sequence[Pack], *, start: Position) -> None:
        """Train from `start` to the last step of the config.

        train: this rank's packs, one list for each optimizer step. held_out: this rank's evaluation packs.
        Every data-parallel rank has at least one if any rank has.

        Raises `Requeue` if the run was asked to stop and has saved. Raises `RollBack`, `NotFinite` or
        `SaveFailed`. All ranks raise the same error at the same step. Raises `CallbackFailed` on the rank
        that reports. The launcher then ends the other ranks.
        """
        steps, position = self.config.train.steps, start
        while position.step < steps:
            self.guard.begin(position.step + 1, "data")
            packs = next(train)
            values = self.advance(position, packs)
            position = position.after(self.config.train.global_batch)
            step, is_last = position.step, position.step == steps
            if values is not None:
                self.report(step, values, packs, seconds=self.guard.elapsed())
            if held_out and (is_last or _due(step, self.config.train.eval_every)):
                self.evaluate(step, held_out)
            if is_last or self.guard.leaving or _due(step, self.config.checkpoint.every):
                self.save(position)
            if self.guard.leaving and not is_last:
                self.leave(step)
            self.announce_saves()
        self.finish_saves(steps)

    def advance(self, position: Position, packs: list[Pack]) -> dict[str, float] | None:
        """Take one step of the run. Returns None if its packs are skipped. The schedule always advances."""
        start = position.consumed_packs
        end = start + self.config.train.global_batch
        if not self.guard.skips.covers(start, end):
            try:
                return self.step(packs)
            except NotFinite as found:
                # A policy may end or roll back the run, so a checkpoint in progress must be published first.
                self.checkpoints.wait()
                self.guard.skips.decide(start, end, position.step + 1, found)
        self.scheduler.step(increment=1)
        return None

    def step(self, packs: list[Pack]) -> dict[str, float]:
        """Take one optimizer step.

        Returns the stage's metrics (on the last pipeline stage), the gradient norm and the learning rate.
        Raises `NotFinite` on all ranks if a loss or a gradient is not finite. The weights are then unchanged.
        """
        self.guard.enter("forward and backward")
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        # The scheduler has already been placed at this step.
        sums = self.stepper(packs, step=self.scheduler.num_steps)
        self.guard.enter("update")
        # The norm comes before the update, so that a step that is not finite can be refused. Reading it also
        # waits for the GPU, which the heartbeat's timing events need.
        norm, rate = gradient_norm(self.optimizer), self.optimizer.param_groups[0]["lr"]
        self.check(norm, packs)
        # An asynchronous save copies live parameters and Adam's state. The optimizer must not overwrite them
        # before the copy has finished.
        self.checkpoints.wait_for_copy()
        self.optimizer.step()
        self.scheduler.step(increment=1)
        return {**_means(sums), "grad_norm": norm, "lr": rate}

    def check(self, norm: float, packs: list[Pack]) -> None:
        """Check on all ranks that losses and gradients are finite and that no save has failed.

        Raises `NotFinite` or `SaveFailed` on all ranks.
        """
        # Losses exist on the last pipeline stage only, and a failed save is known on one rank only. Without
        # this exchange one rank would raise while the others wait for it in the next collective.
        bad = not_finite(self.stepper.losses)
        statuses = self.guard.exchange_status(
            bad_loss=bool(bad), save_failed=self.checkpoints.failed, load=self._load(packs)
        )
        if any(status.save_failed for status in statuses):
            self.checkpoints.wait()
        kind = "loss"
        if not any(status.bad_loss for status in statuses):
            if math.isfinite(norm):
                return
            # The norm is reduced over all ranks, so every rank takes this branch together.
            self.guard.begin(self.guard.step, "search for bad gradients", patience=PATIENCE)
            kind, bad = "gradient", self.stepper.bad_gradients(packs)
        places = name_places(kind, bad, packs, self.topology, self.guard.sources)
        unseen = "no rank finds it again when it repeats its microbatches: perhaps a transient hardware fault"
        raise NotFinite(self.guard.step, norm, places or [unseen])

    def save(self, position: Position) -> None:
        """Begin a checkpoint. With `checkpoint.asynchronous` training goes on while it is written."""
        self.guard.begin(position.step, "save", patience=PATIENCE)
        self.checkpoints.save(position, self.chunks, self.optimizer)

    def finish_saves(self, step: int) -> None:
        """Wait until every checkpoint is published."""
        self.guard.begin(step, "last checkpoint", patience=PATIENCE)
        self.checkpoints.wait()
        self.guard.end()
        self.announce_saves()

    def announce_saves(self) -> None:
        """Call the callbacks for the checkpoints that have been published since the last call."""
        for step, directory in self.checkpoints.newly_published():
            for callback in self.callbacks:
                callback.on_save(step, directory)

    def leave(self, step: int) -> None:
        """Wait until the checkpoint is published, then raise `Requeue`."""
        self.finish_saves(step)
        self.metrics.console(f"asked to stop ({self.guard.asked}): saved after step {step}, to be requeued")
        raise Requeue

    @torch.no_grad()
    def evaluate(self, step: int, packs: Sequence[Pack]) -> None:
        """Report the mean metrics over the held-out packs."""
        # Other ranks may have more packs, by at most one group of the pipeline.
        most = len(packs) + self.config.parallel.pipeline
        patience = most * self.topology.data_size / self.config.train.global_batch
        self.guard.begin(step, "evaluation", patience=max(1.0, patience))
        for chunk in self.chunks:
            chunk.eval()
        sums = self.stepper(packs, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        values = _means(sums)
        for callback in self.callbacks:
            callback.on_evaluate(step, values)

    def report(self, step: int, values: dict[str, float], packs: Sequence[Pack], *, seconds: float) -> None:
        """Pass a step's metrics to the callbacks.

        Throughput counts real tokens without padding. FLOPs count the keys that each token attends to. This
        does not wait for the GPU, which still updates the weights: that time would be missing in every step.
        """
        load = self.guard.load
        flops = step_flops(self.config, load).model / seconds
        values |= {"tokens": load.tokens, "seconds": seconds, "tokens_per_second": load.tokens / seconds}
        values["saves_stalled_seconds"] = self.checkpoints.stalled
        values["memory_gib"] = peak_memory(self.topology.device) / GIB
        if self.topology.device.type == "cuda":
            gpu = gpu_of_device(torch.cuda.get_device_name())
            values["tflops_per_gpu"] = flops / self.topology.world_size / 1e12
            if gpu is not None:
                values["mfu"] = flops / self.topology.world_size / gpu.bf16
        if "loss" not in values:
            return
        values |= self.guard.look_for_spikes(step, values, list(packs), self.stepper.losses)
        for callback in self.callbacks:
            callback.on_step(step, values)

    def _load(self, packs: Sequence[Pack]) -> Load:
        """The work of the packs of the last step. Only real tokens count."""
        layout = store_layout(self.config)
        tokens = sum(pack.lengths.sum() for pack in packs)
        if self.config.joins_documents:
            squares = sum(int(pack.lengths.sum()) ** 2 for pack in packs)
        else:
            squares = sum(attended(pack.lengths, pack.ranks, layout).sum() for pack in packs)
        return Load(float(tokens), float(squares), float(self.stepper.trained))


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors on the GPU had so far. On the CPU, the most that the process had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, and macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _means(sums: dict[str, float]) -> dict[str, float]:
    """The mean of each metric: name -> sum / count. A metric whose count is 0 is left out."""
    names = [name for name in sums if not name.endswith("_count")]
    return {name: sums[name] / sums[f"{name}_count"] for name in names if sums[f"{name}_count"] > 0}
