"""Shared by the preference stages: the pairs of a pack, prompts of several responses, and segment sums."""

import dataclasses
from collections.abc import Callable
from itertools import combinations, groupby
from typing import Any

import torch
from torch import Tensor

from megatron_post.data.batch import Comparisons, PackedBatch
from megatron_post.data.pack import Pack


def compare(pack: Pack, *, best_and_worst: bool = False) -> Comparisons:
    """All ranked pairs of each unit of a pack, with the better response first.

    best_and_worst: pair only the best response with the worst. A store that was packed for the reward model
    may have three responses in a unit.
    """
    better, worse, weights, ranks, examples = [], [], [], [], 0
    segments = [s for s in range(len(pack.ranks)) if pack.ranks[s] >= 0]
    for _, members in groupby(segments, key=lambda s: int(pack.unit_ids[s])):
        by_rank = sorted(members, key=lambda s: int(pack.ranks[s]))
        if best_and_worst:
            del by_rank[1:-1]
        pairs = list(combinations(by_rank, 2))
        examples += 1
        for a, b in pairs:
            better.append(a)
            worse.append(b)
            weights.append(1 / len(pairs))
            ranks.append((int(pack.ranks[a]), int(pack.ranks[b])))
    return Comparisons(
        better=torch.tensor(better, dtype=torch.long),
        worse=torch.tensor(worse, dtype=torch.long),
        weights=torch.tensor(weights, dtype=torch.float32),
        ranks=torch.tensor(ranks, dtype=torch.long).reshape(-1, 2),
        examples=torch.tensor(examples),
    )


def behind_prompts(batch: PackedBatch, pack: Pack, *, blind: bool) -> PackedBatch:
    """Let responses attend to the prompt's segment before them, and continue its positions.

    blind: each response sees only the prompt, and its positions continue from the prompt's end. Otherwise it
    also sees the responses before it, and its positions continue from the end of the last one.
    """
    seen = torch.zeros(len(pack.ranks), 2, dtype=torch.long)
    offsets = torch.zeros(len(pack.ranks), dtype=torch.long)
    prompt = 0
    for segment, rank in enumerate(pack.ranks.tolist()):
        if rank < 0:
            prompt = segment
            continue
        last = prompt + 1 if blind else segment
        seen[segment] = torch.tensor((prompt, last))
        offsets[segment] = int(pack.lengths[prompt:last].sum())
    return dataclasses.replace(batch, seen=seen, positions=batch.positions + offsets[batch.segments])


class SegmentSums:
    """Sums of per-token values over segments, complete on every context-parallel rank.

    Every rank gets the same sums, so only one rank may count a loss that is made of them. `is_counted` is
    True on that rank. Otherwise megatron-core would divide by a count that is CP times too large.

    over_context: a differentiable function that sums a tensor over the context-parallel ranks, or None for
    one rank. size: number of these ranks.
    """

    def __init__(
        self,
        over_context: Callable[[Tensor], Tensor] | None = None,
        *,
        size: int = 1,
        is_counted: bool = True,
    ) -> None:
        self.over_context, self._size, self.is_counted = over_context, size, is_counted

    def __call__(self, values: Tensor, segments: Tensor, *, count: int) -> Tensor:
        """Sum values over each segment. Returns fp32 [k, count], differentiable in `values`.

        values: fp32 [k, t / cp], zero for tokens that do not count. segments: int64 [t / cp], each token's
        segment. count: number of segments.
        """
        sums = values.new_zeros(values.shape[0], count).index_add(1, segments, values)
        return sums if self.over_context is None else self.over_context(sums)

    def local_offsets(self, cu_seqlens: Tensor) -> Tensor:
        """The offsets of the segments among this rank's tokens, int [n + 1], from those of the pack.

        The zigzag split gives every rank an equal share of every segment, and keeps the share contiguous.
        """
        return cu_seqlens // self._size

    def counted(self, loss_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and count on the rank that counts them, and zero on other ranks."""
        if self.is_counted:
            return loss_sum, count
        # The product keeps the loss in the graph. The backward of `over_context` is a collective, so every
        # rank must run it, and it brings the counting rank's gradients to all ranks' tokens.
        return loss_sum * 0.0, count * 0


def metric(values: Tensor, weights: Tensor | None = None) -> Any:
    """The weighted (sum, count) of values [p]."""
    weights = torch.ones_like(values) if weights is None else weights
    return (values.detach() * weights).sum(), weights.sum()
