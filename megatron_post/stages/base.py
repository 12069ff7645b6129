"""The protocol of a stage. A stage is a small object that satisfies it, and not a subclass."""

from typing import Protocol

from torch import Tensor

from megatron_post.data.batch import PackedBatch
from megatron_post.data.pack import Pack

# name -> (sum, count). Ranks and microbatches are reduced by adding both.
Metrics = dict[str, tuple[Tensor, Tensor]]


class Stage(Protocol):
    """A post-training method."""

    def collate(self, pack: Pack) -> PackedBatch:
        """The tensors of a pack, with its labels and a mask of the trained ones."""

    def loss(self, output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Metrics]:
        """(loss sum, count, metrics) for the model's output on this rank's part of a batch.

        megatron-core divides the gradients by the count, summed over all ranks and microbatches.
        """
