"""What the preference stages share: pairs of a pack, and sums over segments that context parallelism
splits."""

from collections.abc import Callable
from itertools import combinations, groupby
from typing import Any

import torch
from torch import Tensor

from megatron_post.data.batch import Comparisons
from megatron_post.data.pack import Pack


def compare(pack: Pack, *, best_and_worst: bool = False) -> Comparisons:
    """All ranked pairs of each unit of a pack, the better response first; or the best with the worst alone,
    where a store that was packed for the reward model has three."""
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


class SegmentSums:
    """Sums of per-token values over segments, complete on every context-parallel rank.

    Every rank gets the same sums, so a loss made of them must be counted on one rank alone: `is_counted`.

    over_context: the sum of a tensor over the ranks, on each of them, and differentiable; None where there is
      one. size: how many there are.
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
        """values: fp32 [k, t / cp], zero where a token takes no part; segments: int64 [t / cp], the segment
        of each.

        Returns fp32 [k, count], differentiable in `values`.
        """
        sums = values.new_zeros(values.shape[0], count).index_add(1, segments, values)
        return sums if self.over_context is None else self.over_context(sums)

    def local_offsets(self, cu_seqlens: Tensor) -> Tensor:
        """Where each segment's part begins among this rank's tokens: int [n + 1], from a pack's offsets. The
        zigzag split gives every rank an equal share of every segment, and keeps it together."""
        return cu_seqlens // self._size

    def counted(self, loss_sum: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The loss on the rank that counts it, zero elsewhere; gradients still reach every rank's tokens."""
        if self.is_counted:
            return loss_sum, count
        return loss_sum * 0.0, count * 0


def metric(values: Tensor, weights: Tensor | None = None) -> Any:
    """(sum, count) of values [p], weighted."""
    weights = torch.ones_like(values) if weights is None else weights
    return (values.detach() * weights).sum(), weights.sum()
