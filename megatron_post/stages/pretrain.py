"""Continued pre-training: cross-entropy on every token of documents, except begin-of-text."""

import dataclasses
from typing import Literal

from torch import Tensor

from megatron_post.data.batch import PackedBatch, batch_of_pack, role_numbers
from megatron_post.data.pack import Pack
from megatron_post.stages.base import Metrics
from megatron_post.stages.sft import sft_loss


class Pretrain:
    """Trains texts and their end-of-text tokens. The count is that of trained tokens."""

    def __init__(self, attention: Literal["document", "pack"]) -> None:
        self._joins = attention == "pack"
        self._trained_roles = role_numbers(("body", "terminator"))

    def collate(self, pack: Pack) -> PackedBatch:
        """Tensors of a pack. Documents that see each other are one segment, as long as the pack."""
        return batch_of_pack(_joined(pack) if self._joins else pack, self._trained_roles)

    def loss(self, output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Metrics]:
        """Loss of this rank's tokens. output: logps [t / cp] of the labels."""
        loss_sum, count = sft_loss(output, batch.trained)
        return loss_sum, count, {"loss": (loss_sum.detach(), count)}


def _joined(pack: Pack) -> Pack:
    """The pack as one segment. Its documents have no padding between them, only behind the last one.

    No real token sees this padding, because attention is causal.
    """
    return dataclasses.replace(
        pack,
        cu_seqlens=pack.cu_seqlens[[0, -1]],
        lengths=pack.lengths.sum(keepdims=True, dtype=pack.lengths.dtype),
    )
