"""Distributes the packs of a global batch over data-parallel ranks, so that all ranks take equally long.

All packs have the same number of tokens, and all ranks get the same number of packs. So the time of two ranks
differs only by attention, whose cost grows with the squares of segment lengths. Even sums of squares give
even times on any model and GPU, and they can be computed from the store alone.
"""

import heapq

import numpy as np

from megatron_post.data.pack import tail_length
from megatron_post.data.store import PackStore
from megatron_post.data.store_format import SEPARATE


def squares(store: PackStore, packs: np.ndarray) -> np.ndarray:
    """The cost of attention in each of `packs` (int64 [n]), int64 [n], which is the sum of length^2.

    Lengths include padding. The padding at a pack's end counts too, because it is short segments to the
    attention kernel. A response that sees a prompt of s tokens counts length^2 + 2 length s. The function
    reads only the lengths of these packs.
    """
    starts, stops = store.index.segments(packs)
    counts = stops - starts
    ends = np.cumsum(counts)
    segments = np.repeat(starts - ends + counts, counts) + np.arange(ends[-1])
    padded = store.index.rows("padded", segments).astype(np.int64)
    each = attended(padded, store.index.rows("rank", segments), store.settings.layout)
    tails = store.settings.pack_length - _sums(padded, ends, counts)
    length = tail_length(store.settings.segment_multiple)
    return _sums(each, ends, counts) + tails // length * length**2 + (tails % length) ** 2


def attended(lengths: np.ndarray, ranks: np.ndarray, layout: str) -> np.ndarray:
    """length^2 + 2 length s of each segment that sees s tokens of earlier segments, int64 [segments].

    lengths, ranks: int [segments], of whole packs in their order. layout: the store's layout.
    """
    lengths = lengths.astype(np.int64)
    if layout in SEPARATE:
        return lengths**2
    number = np.arange(len(lengths))
    prompts = np.maximum.accumulate(np.where(ranks < 0, number, 0))
    if layout in ("isolated", "isolated_pairs"):
        seen = np.where(prompts < number, lengths[prompts], 0)
    else:
        before = np.cumsum(lengths) - lengths
        seen = before - before[prompts]
    return lengths * (lengths + 2 * seen)


def _sums(values: np.ndarray, ends: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums over consecutive runs of values. Run i has `counts[i]` values and ends before `ends[i]`."""
    totals = np.concatenate([[0], np.cumsum(values)])
    return totals[ends] - totals[ends - counts]


def deal(costs: np.ndarray, *, ranks: int) -> np.ndarray:
    """Distribute packs over ranks so that the ranks' sums of costs are nearly equal.

    costs: int64 [n], where n is a multiple of `ranks`. Returns int64 [ranks, n / ranks], the indices of each
    rank's packs with the costliest first.

    The costliest remaining pack goes to the rank with the smallest sum that still has room (Graham's LPT,
    1969, with a limit on the number of packs). Then the ranks with the largest and the smallest sum swap the
    two packs that even them out most, as long as that helps.

    Each rank starts with its costliest pack for two reasons. A pipeline drains with its last packs, so these
    should be cheap. And ranks that meet at a collective are then at packs of similar cost. The result is
    deterministic, because costs are integers and ties go to the first pack.
    """
    places = len(costs) // ranks
    assert places * ranks == len(costs)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    open_ranks = [(0, rank) for rank in range(ranks)]
    for pack in np.argsort(-costs, kind="stable").tolist():
        total, rank = open_ranks[0]
        shares[rank].append(pack)
        if len(shares[rank]) < places:
            heapq.heapreplace(open_ranks, (total + int(costs[pack]), rank))
        else:
            heapq.heappop(open_ranks)
    dealt = np.array(shares, dtype=np.int64).reshape(ranks, places)
    _swap(dealt, costs)
    order = np.lexsort((dealt, -costs[dealt]), axis=1)
    return np.take_along_axis(dealt, order, axis=1)


def _swap(dealt: np.ndarray, costs: np.ndarray) -> None:
    """Swap packs between the ranks of largest and smallest sum, in place, until the largest cannot fall."""
    sums = costs[dealt].sum(axis=1)
    while True:
        full, empty = int(sums.argmax()), int(sums.argmin())
        given = costs[dealt[full]]
        by_cost = np.argsort(costs[dealt[empty]], kind="stable")
        ascending = costs[dealt[empty]][by_cost]
        # The best partner of a pack is cheaper by half the difference of the sums. One of the two packs whose
        # costs are next to that value is the closest.
        above = np.searchsorted(ascending, given - (sums[full] - sums[empty]) // 2)
        places = np.stack([np.maximum(above - 1, 0), np.minimum(above, len(ascending) - 1)])
        moved = given - ascending[places]
        fuller = np.maximum(sums[full] - moved, sums[empty] + moved)
        best = np.unravel_index(fuller.argmin(), fuller.shape)
        if fuller[best] >= sums[full]:
            return
        of_full, of_empty = best[1], by_cost[places[best]]
        dealt[full, of_full], dealt[empty, of_empty] = dealt[empty, of_empty], dealt[full, of_full]
        sums[full] -= moved[best]
        sums[empty] += moved[best]
