"""A whole run in days, GPU-hours, disk space, requeues and interruptions."""

import math
from dataclasses import dataclass
from typing import Any

from megatron_post.config.schema import Config
from megatron_post.plan.estimate import Plan
from megatron_post.plan.shape import model_parameters

# "The Llama 3 Herd of Models", section 3.3.4: 419 unexpected interruptions in 54 days on 16,384 GPUs, so a
# node of 8 fails once in 54 x 24 x 2,048 / 419 hours.
NODE_HOURS = 6334.0
RESTART_SECONDS = 600.0  # from an interruption to the first step. An assumption


@dataclass(frozen=True)
class Outlook:
    """What a plan's run takes.

    time_limit: seconds of a Slurm job. node_hours: mean hours until a node fails.
    """

    plan: Plan
    time_limit: float = 24 * 3600.0
    node_hours: float = NODE_HOURS

    @property
    def training_hours(self) -> float:
        """Hours of all steps without interruptions, loading, evaluation and saving."""
        return self.plan.config.train.steps * self.plan.time.seconds / 3600

    @property
    def requeues(self) -> int:
        """Times that the job reaches its time limit, saves, and queues again."""
        return max(0, math.ceil(self.hours * 3600 / self.time_limit) - 1)

    @property
    def interruptions(self) -> float:
        """Expected failures of a node while the run trains."""
        return self.training_hours * self.plan.gpus / self.plan.gpu.per_node / self.node_hours

    @property
    def lost_seconds(self) -> float:
        """Expected seconds of an interruption: half the steps between two checkpoints, and the restart.

        A run without checkpoints loses half of all its steps.
        """
        every = self.plan.config.checkpoint.every or self.plan.config.train.steps
        repeated = min(every, self.plan.config.train.steps) / 2
        return repeated * self.plan.time.seconds + RESTART_SECONDS

    @property
    def hours(self) -> float:
        """Hours with interruptions."""
        return self.training_hours + self.interruptions * self.lost_seconds / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.plan.gpus

    @property
    def checkpoint_bytes(self) -> int | None:
        """Bytes of a checkpoint of the whole model. None for a run that trains an adapter alone."""
        config = self.plan.config
        if config.adapter is not None:
            return None
        weight = 2 if config.precision.dtype == "bf16" else 4
        moment = 2 if config.optimizer.moments == "bf16" else 4
        return model_parameters(config) * (weight + 4 + 2 * moment)  # fp32 masters and Adam's two moments

    @property
    def values(self) -> dict[str, Any]:
        """Plain values for tools."""
        checkpoint = self.checkpoint_bytes
        count = most_checkpoints(self.plan.config)
        return {
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "requeues": self.requeues,
            "interruptions": self.interruptions,
            "lost_seconds_an_interruption": self.lost_seconds,
            "checkpoint_bytes": checkpoint,
            "checkpoints_bytes": None if checkpoint is None else checkpoint * count,
        }

    @property
    def lines(self) -> list[str]:
        """The outlook in words."""
        steps, found = self.plan.config.train.steps, self.interruptions
        lines = [
            f"{steps:,} steps: {_time(self.hours)}, {self.gpu_hours:,.0f} GPU-hours",
            f"{found:,.1f} interruptions by failed nodes, if one fails in {self.node_hours:,.0f} hours: each "
            f"costs {_time(self.lost_seconds / 3600)}",
            f"{self.requeues:,} requeues with a time limit of {_time(self.time_limit / 3600)}",
        ]
        if self.checkpoint_bytes is not None:
            count = most_checkpoints(self.plan.config)
            lines.append(
                f"{count} checkpoints of {self.checkpoint_bytes / 1e9:,.1f} GB on the disk: "
                f"{count * self.checkpoint_bytes / 1e12:,.2f} TB"
            )
        return lines


def most_checkpoints(config: Config) -> int:
    """Number of checkpoints that exist while the last one is written.

    These are the last one, the newest `keep` before it, and older ones at multiples of `keep_every`.
    """
    settings = config.checkpoint
    if not settings.keep_every or not settings.every:
        return settings.keep + 1
    older = (config.train.steps - 1) // settings.every - settings.keep
    multiples = max(0, older) * settings.every // math.lcm(settings.every, settings.keep_every)
    return settings.keep + 1 + multiples


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
