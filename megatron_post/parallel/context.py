"""The zigzag split of a pack over context-parallel ranks.

Every segment is cut in 2 x CP equal chunks and rank r holds chunks r and 2 CP - 1 - r, so that each rank
carries the same share of every segment's causal triangle. It is the layout that Transformer Engine's packed
attention expects.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class ContextSplit:
    """The split of one pack over `size` ranks. Everything is computed once, for all ranks.

    cu_seqlens: int [n + 1], offsets of the pack's segments, each length a multiple of 2 x size (any, if size
    is 1). Results are on its device.
    Raises `ValueError` for a segment that the split does not divide.
    """

    def __init__(self, cu_seqlens: Tensor, size: int) -> None:
        self.size = size
        self._starts, self._lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        self._tokens = int(cu_seqlens[-1])
        if size > 1 and bool((self._lengths % (2 * size)).any()):
            bad = int(self._lengths[(self._lengths % (2 * size)) != 0][0])
            raise ValueError(
                f"a segment of {bad} tokens cannot be split over {size} context-parallel ranks: pack again "
                f"with segments padded to a multiple of {2 * size}"
            )

    @cached_property
    def order(self) -> Tensor:
        """Where each token of the pack stands in the concatenation of all ranks' parts, rank 0 first. int64
        [t]."""
        tokens = torch.arange(self._tokens, device=self._lengths.device)
        if self.size == 1:
            return tokens
        segment_start = self._starts.repeat_interleave(self._lengths, output_size=self._tokens)
        chunk_length = (self._lengths // (2 * self.size)).repeat_interleave(
            self._lengths, output_size=self._tokens
        )
        within = tokens - segment_start
        chunk = within // chunk_length
        is_second = chunk >= self.size
        rank = torch.where(is_second, 2 * self.size - 1 - chunk, chunk)
        # a rank's part holds its two chunks of every earlier segment, which are 1 / size of these segments
        before = rank * (self._tokens // self.size) + segment_start // self.size
        return before + is_second * chunk_length + within % chunk_length

    @cached_property
    def _parts(self) -> Tensor:
        parts = torch.empty_like(self.order)
        parts[self.order] = torch.arange(self._tokens, device=parts.device)
        return parts.view(self.size, -1)

    def indices(self, rank: int) -> Tensor:
        """Indices in the pack of the tokens that a rank holds, in the order in which it holds them. int64
        [t / size]."""
        return self._parts[rank]

    def chunks(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """The chunks of a rank in the order of its tokens: segment, and the chunk's start and end in it."""
        for segment, length in enumerate(self._lengths.tolist()):
            if self.size == 1:
                yield segment, 0, length
                continue
            chunk = length // (2 * self.size)
            for number in (rank, 2 * self.size - 1 - rank):
                yield segment, number * chunk, (number + 1) * chunk


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
