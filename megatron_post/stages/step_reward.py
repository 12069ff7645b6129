"""The reward model of steps. It says of each step of a solution whether the step is right."""

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from megatron_post.data.batch import PackedBatch, batch_of_pack, role_numbers
from megatron_post.data.pack import Pack
from megatron_post.stages.base import Metrics


class StepReward:
    """Binary cross-entropy of the score at the last token of each labelled step. The count is that of steps.

    The score s is the logit of the probability that the step is right, sigmoid(s). With the label y, which is
    1 or 0, the loss of a step is -y log sigmoid(s) - (1 - y) log sigmoid(-s). See H. Lightman et al., "Let's
    Verify Step by Step", 2023.
    """

    def collate(self, pack: Pack) -> PackedBatch:
        """Tensors of a pack. `trained` marks the last token of labelled steps. Label 1 means right."""
        batch = batch_of_pack(pack, torch.empty(0, dtype=torch.long))
        roles = torch.as_tensor(pack.roles)
        right_step, wrong_step = role_numbers(("right_step", "wrong_step")).tolist()
        right = roles == right_step
        return dataclasses.replace(batch, labels=right.long(), trained=right | (roles == wrong_step))

    def scores(self, output: Tensor, batch: PackedBatch) -> Tensor:
        """The scores of a pack's tokens that this rank holds, in their places, float64 [t]. Others are 0.

        output: scores fp32 [t / cp] of this rank's tokens. The batch must have segments that share no prompt.
        """
        places = batch.cu_seqlens[:-1].long()[batch.segments] + batch.positions
        return output.new_zeros(int(batch.cu_seqlens[-1]), dtype=torch.float64).index_add(
            0, places, output.double()
        )

    def loss(self, output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Metrics]:
        """output: scores fp32 [t / cp] of every token. Each rank counts the steps that end on it."""
        loss_sum, count = step_loss(output, batch.labels, batch.trained)
        right = (output > 0) == (batch.labels > 0)
        hits = torch.where(output == 0, 0.5, right.float())  # a score of 0 is a tie
        error = (torch.sigmoid(output.detach()) - batch.labels) ** 2
        is_right, is_wrong = batch.trained & (batch.labels > 0), batch.trained & (batch.labels == 0)
        metrics: Metrics = {
            "loss": (loss_sum.detach(), count),
            "accuracy": _sum_over(batch.trained, hits),
            # Most steps are right, so that a model that calls every step right has a high accuracy. These two
            # show it.
            "accuracy_right": _sum_over(is_right, hits),
            "accuracy_wrong": _sum_over(is_wrong, hits),
            "brier": _sum_over(batch.trained, error),
        }
        return loss_sum, count, metrics


def step_loss(scores: Tensor, labels: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the binary cross-entropy over trained tokens, and their count.

    scores: fp32 [t], logits. labels: int64 [t], 1 for a right step. trained: bool [t]. Other tokens may have
    any score, including NaN. Returns (loss sum [], count int []). A rank without a step returns 0 and 0.
    """
    # An untrained NaN is replaced before the loss. `where` after the loss alone would give NaN gradients.
    safe = torch.where(trained, scores, torch.zeros_like(scores))
    losses = binary_cross_entropy_with_logits(safe, labels.to(scores.dtype), reduction="none")
    return torch.where(trained, losses, torch.zeros_like(losses)).sum(), trained.sum().to(torch.int32)


def _sum_over(marked: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The (sum, count) of values [t] over marked tokens."""
    return torch.where(marked, values.detach(), torch.zeros_like(values)).sum(), marked.sum().float()
