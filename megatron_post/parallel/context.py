"""The zigzag split of a pack over context-parallel ranks.

Every segment is cut into 2 x CP equal chunks, and rank r holds chunks r and 2 CP - 1 - r. So each rank has
the same share of every segment's causal triangle. Transformer Engine's packed attention expects this layout.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class ContextSplit:
    """The split of one pack over `size` ranks. Results are computed once, for all ranks.

    cu_seqlens: int [n + 1], offsets of the pack's segments. Results are on its device. If size is above 1,
    each segment's length must be a multiple of 2 x size, and otherwise `ValueError` is raised.
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
        """int64 [t], the index of each of the pack's tokens in the concatenation of all ranks' parts."""
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
        # A rank has two chunks of every earlier segment, which together are 1 / size of the segment.
        before = rank * (self._tokens // self.size) + segment_start // self.size
        return before + is_second * chunk_length + within % chunk_length

    @cached_property
    def _parts(self) -> Tensor:
        parts = torch.empty_like(self.order)
        parts[self.order] = torch.arange(self._tokens, device=parts.device)
        return parts.view(self.size, -1)

    def indices(self, rank: int) -> Tensor:
        """int64 [t / size], the indices in the pack of a rank's tokens, in the rank's order."""
        return self._parts[rank]

    def chunks(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """A rank's chunks in the order of its tokens. Yields (segment, start in the segment, end in it)."""
        for segment, length in enumerate(self._lengths.tolist()):
            if self.size == 1:
                yield segment, 0, length
                continue
            chunk = length // (2 * self.size)
            for number in (rank, 2 * self.size - 1 - rank):
                yield segment, number * chunk, (number + 1) * chunk


def sum_over_ranks(x: Tensor, group: Any) -> Tensor:
    """The sum of `x` over a group's ranks, on all ranks. The backward sums the gradients of all ranks.

    The loss is counted on one rank only, and every rank's `x` contributes to it. Without the sum in the
    backward, only that rank's tokens would get a gradient.
    """
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
