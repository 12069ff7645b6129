"""Ranking loss of the reward model: `-log sigmoid(r_better - r_worse)`, without a margin term.

"The Llama 3 Herd of Models", section 4.1.1; Ouyang et al. (2022), equation 1, over all ranked pairs of an
example. With the margin m of a pair and its weight w,
    loss = sum w (-log sigmoid(m))    d loss / d r_better = -w sigmoid(-m) = -d loss / d r_worse.
One launch computes the loss, margins and gradient. Each program owns some responses and reads all pairs in
order, so only one program writes the gradient of a response in two pairs. A pack has few pairs, which stay in
the cache.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_post_kernels.implementation import Implementation, resolve

_SCORES, _PAIRS = 32, 64  # responses that a program owns, and pairs that it processes at a time
_NUM_WARPS = 4


def ranking_loss_torch(
    scores: Tensor, better: Tensor, worse: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The reference of `ranking_loss` in plain torch and in the dtype of its input."""
    margins = scores[better] - scores[worse]
    return -(weights * F.logsigmoid(margins)).sum(), margins.detach()


def ranking_loss(
    scores: Tensor, better: Tensor, worse: Tensor, weights: Tensor, *, impl: Implementation = "auto"
) -> tuple[Tensor, Tensor]:
    """Weighted sum of `-log sigmoid(better - worse)`, differentiable in `scores`, and the margins.

    scores: fp32 [s], one for each segment. better, worse: int64 [p], the segments of each pair's responses. A
    segment may be in several pairs or in none. weights: fp32 [p], 1 / number of pairs of the example.
    Returns (loss sum [], margins [p]). A pair with equal scores has the loss ln 2.
    Raises `ValueError` for scores that are not fp32 with the kernel, and if `impl` cannot run.
    """
    if resolve(impl, scores) == "torch":
        return ranking_loss_torch(scores, better, worse, weights)
    if scores.dtype != torch.float32:
        raise ValueError(f"scores are {scores.dtype}, the kernel takes torch.float32: call .float()")
    loss, margins = _RankingLoss.apply(
        scores.contiguous(), better.contiguous(), worse.contiguous(), weights.float().contiguous()
    )
    return loss, margins


class _RankingLoss(torch.autograd.Function):
    """(loss [], margins [p]). The kernel also computes the gradient, which the backward pass scales."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, better: Tensor, worse: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        from megatron_post_kernels.ranking_loss_kernels import rank_pairs

        loss, margins, gradient = (
            scores.new_empty(()),
            scores.new_empty(len(better)),
            scores.new_empty(len(scores)),
        )
        programs = max(1, -(-len(scores) // _SCORES))  # at least one, because the first writes the loss
        with torch.cuda.device_of(scores):
            rank_pairs[(programs,)](
                scores,
                better,
                worse,
                weights,
                loss,
                margins,
                gradient,
                len(scores),
                len(better),
                SCORES=_SCORES,
                PAIRS=_PAIRS,
                num_warps=_NUM_WARPS,
            )
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(margins)
        return loss, margins

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None
