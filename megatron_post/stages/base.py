"""What the trainer asks of a stage. A stage is a small object that satisfies this protocol, not a
subclass."""

from typing import Literal, Protocol

from torch import Tensor

from megatron_post.data.batch import PackedBatch
from megatron_post.data.pack import Pack

Metrics = dict[
    str, tuple[Tensor, Tensor]
]  # name -> (sum, count), reduced over ranks and microbatches as sums


class Stage(Protocol):
    """A post-training method."""

    @property
    def head(self) -> Literal["lm", "scalar"]:
        """What the model gives: log-probabilities of labels, or a score a token."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference policy."""

    def collate(self, pack: Pack) -> PackedBatch:
        """Tensors of a pack: labels, and which of them are trained."""

    def loss(self, output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Metrics]:
        """(loss sum, count, metrics) of the model's output for this rank's part of a batch."""
