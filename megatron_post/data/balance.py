"""Which data-parallel rank takes which packs of a global batch, so that all take equally long.

Packs have equally many tokens, and a rank takes equally many packs, so whatever a token costs, two ranks
differ by attention alone: by the squares of their segments. The most even squares are the most even times on
any model and GPU, and nothing but the store is asked.
"""

import heapq

import numpy as np

from megatron_post.data.store import PackStore


def squares(store: PackStore, packs: np.ndarray) -> np.ndarray:
    """What attention in `packs` (int64 [n]) costs, int64 [n]: the sum over segments of length^2, padding
    included. The padding at a pack's end counts, as the segment that it is to the attention kernel.

    A response that sees a prompt of s tokens counts length^2 + 2 length s. Reads the lengths of these packs
    alone, whatever else the store holds.
    """
    starts = store.segment_offsets[packs]
    counts = store.segment_offsets[packs + 1] - starts
    ends = np.cumsum(counts)
    segments = np.repeat(starts - ends + counts, counts) + np.arange(ends[-1])
    padded = store.column("padded")[segments].astype(np.int64)
    each = attended(padded, store.column("rank")[segments], store.settings.layout)
    tails = store.settings.pack_length - _sums(padded, ends, counts)
    return _sums(each, ends, counts) + tails * tails


def attended(lengths: np.ndarray, ranks: np.ndarray, layout: str) -> np.ndarray:
    """length^2 + 2 length s of each segment, int64 [segments]: it sees s tokens of earlier ones.

    lengths, ranks: of the segments of whole packs, in their order; layout: of the store.
    """
    lengths = lengths.astype(np.int64)
    if layout in ("dialogs", "separate"):
        return lengths**2
    number = np.arange(len(lengths))
    prompts = np.maximum.accumulate(np.where(ranks < 0, number, 0))
    if layout == "isolated":
        seen = np.where(prompts < number, lengths[prompts], 0)
    else:
        before = np.cumsum(lengths) - lengths
        seen = before - before[prompts]
    return lengths * (lengths + 2 * seen)


def _sums(values: np.ndarray, ends: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums over runs of `counts` values that end before `ends`."""
    totals = np.concatenate([[0], np.cumsum(values)])
    return totals[ends] - totals[ends - counts]


def deal(costs: np.ndarray, *, ranks: int) -> np.ndarray:
    """Deal packs of `costs` (int64 [n], n a multiple of `ranks`) out so that the ranks' sums are nearly
    equal: int64 [ranks, n / ranks], indices of the packs, on each rank the costliest first.

    The costliest goes to the rank with least so far that still has a place (Graham's LPT, 1969, with places
    counted). Then the fullest rank and the emptiest swap the two packs that even them out most, for as long
    as that helps. Costliest first, for a pipeline ends its step on what is still under way, and ranks that
    wait for each other at a collective then stand at packs of a kind. Deterministic: integers, and of equal
    packs the first.
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
    """Swap packs between the fullest and the emptiest rank, in place, until the fullest cannot fall."""
    sums = costs[dealt].sum(axis=1)
    while True:
        full, empty = int(sums.argmax()), int(sums.argmin())
        given = costs[dealt[full]]
        by_cost = np.argsort(costs[dealt[empty]], kind="stable")
        ascending = costs[dealt[empty]][by_cost]
        # the best that a pack can be swapped for is half the difference cheaper: one of the two next to that
        above = np.searchsorted(ascending, given - (sums[full] - sums[empty]) // 2)
        places = np.stack([np.maximum(above - 1, 0), np.minimum(above, len(ascending) - 1)])
        moved = given - ascending[places]
        fuller = np.maximum(sums[full] - moved, sums[empty] + moved)
        best = np.unravel_index(fuller.argmin(), fuller.shape)
        if fuller[best] >= sums[full]:
            return
        mine, theirs = best[1], by_cost[places[best]]
        dealt[full, mine], dealt[empty, theirs] = dealt[empty, theirs], dealt[full, mine]
        sums[full] -= moved[best]
        sums[empty] += moved[best]
