"""The zigzag split of a pack over context-parallel ranks.

Every segment is cut in 2 x CP equal chunks and rank r holds chunks r and 2 CP - 1 - r, so that each rank
carries the same share of every segment's causal triangle. It is the layout that Transformer Engine's packed
attention expects.
"""

from typing import Any

import torch
from torch import Tensor


def zigzag_indices(cu_seqlens: Tensor, *, rank: int, size: int) -> Tensor:
    """Indices in the pack of the tokens that a context-parallel rank holds, in the order in which it holds
    them.

    cu_seqlens: int [n + 1], offsets of the pack's segments, each length a multiple of 2 x size (any, if size
    is 1). Returns int64 [t / size], on the device of `cu_seqlens`.
    Raises `ValueError` for a segment that the split does not divide.
    """
    device = cu_seqlens.device
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]), device=device)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    if bool((lengths % (2 * size)).any()):
        bad = int(lengths[(lengths % (2 * size)) != 0][0])
        raise ValueError(
            f"a segment of {bad} tokens cannot be split over {size} context-parallel ranks: pack again with "
            f"segments padded to a multiple of {2 * size}"
        )
    pieces = []
    for start, chunk in zip(starts.tolist(), (lengths // (2 * size)).tolist(), strict=True):
        for position in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(start + position * chunk, start + (position + 1) * chunk))
    return torch.cat(pieces).to(device)


def gathered_order(cu_seqlens: Tensor, *, size: int) -> Tensor:
    """Where each token of the pack stands in the concatenation of all ranks' parts, rank 0 first. int64
    [t]."""
    parts = torch.cat([zigzag_indices(cu_seqlens, rank=rank, size=size) for rank in range(size)])
    order = torch.empty_like(parts)
    order[parts] = torch.arange(parts.numel(), device=parts.device)
    return order


def sum_over_ranks(x: Tensor, group: Any) -> Tensor:
    """The sum of `x` over a group's ranks, on all of them; its gradient is the sum of all ranks'
    gradients."""
    return x if group.size() == 1 else _SumOverRanks.apply(x, group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None
