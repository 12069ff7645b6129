"""Supervised fine-tuning: cross-entropy on the tokens of the trained roles. Prompts are masked."""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_post.config.losses import RoleName
from megatron_post.data.batch import PackedBatch, batch_of_pack, role_numbers
from megatron_post.data.pack import Pack
from megatron_post.stages.base import Metrics


class SFT:
    """Trains the assistant's tokens.

    By default these are bodies and terminators, so that it learns to stop.
    """

    def __init__(self, trained_roles: Iterable[RoleName]) -> None:
        self._trained_roles = role_numbers(trained_roles)

    def collate(self, pack: Pack) -> PackedBatch:
        return batch_of_pack(pack, self._trained_roles)

    def loss(self, output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Metrics]:
        """Loss of this rank's tokens. output: logps [t / cp] of the labels."""
        loss_sum, count = sft_loss(output, batch.trained)
        return loss_sum, count, {"loss": (loss_sum.detach(), count)}


def sft_loss(logps: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log p over trained tokens, and their count.

    logps: [t], log-probability of each token's label. Untrained tokens may have any value, including NaN.
    trained: bool [t]. Returns (loss sum [], count int []). A rank without trained tokens returns 0 and 0,
    with zero gradients. megatron-core divides the gradient by the count over all ranks and microbatches.
    """
    # A product with the mask would give NaN for an untrained NaN, because NaN times 0 is NaN.
    losses = torch.where(trained, -logps, torch.zeros_like(logps))
    return losses.sum(), trained.sum().to(torch.int32)
