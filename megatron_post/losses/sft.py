"""Cross-entropy of supervised fine-tuning, from per-token log-probabilities."""

import torch
from torch import Tensor


def sft_loss(logps: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log p over trained tokens, and their count.

    logps: [t], log-probability of each token's label (any value, NaN included, where untrained).
    trained: bool [t].
    Returns (loss sum [], count int []); a rank without trained tokens gives 0 and 0, and zero gradients.
    The gradient is divided by the count summed over all ranks and microbatches, never by a mean of means.
    """
    losses = torch.where(trained, -logps, torch.zeros_like(logps))
    return losses.sum(), trained.sum().to(torch.int32)
