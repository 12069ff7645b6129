"""Supervised fine-tuning: cross-entropy on the trained roles, prompts masked."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from megatron_post.config.schema import RoleName
from megatron_post.data.batch import PackedBatch, batch_of_pack, role_numbers
from megatron_post.data.pack import Pack
from megatron_post.stages.base import Metrics


class SFT:
    """Trains the assistant's tokens: by default bodies and their terminators, for it must learn to stop."""

    head: Literal["lm"] = "lm"
    needs_reference = False

    def __init__(self, trained_roles: Iterable[RoleName]) -> None:
        self._trained_roles = role_numbers(trained_roles)

    def collate(self, pack: Pack) -> PackedBatch:
        return batch_of_pack(pack, self._trained_roles)

    def loss(self, output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Metrics]:
        """output: logps [t / cp] of the labels."""
        loss_sum, count = sft_loss(output, batch.trained)
        return loss_sum, count, {"loss": (loss_sum.detach(), count)}


def sft_loss(logps: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log p over trained tokens, and their count.

    logps: [t], log-probability of each token's label (any value, NaN included, where untrained).
    trained: bool [t].
    Returns (loss sum [], count int []). A rank without trained tokens gives 0 and 0, and zero gradients.
    The gradient is divided by the count summed over all ranks and microbatches, never by a mean of means.
    """
    losses = torch.where(trained, -logps, torch.zeros_like(logps))
    return losses.sum(), trained.sum().to(torch.int32)
