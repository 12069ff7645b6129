"""Triton kernel of `ranking_loss`. This module is imported at the first launch, which needs Triton."""

import triton
from triton import language as tl

from megatron_post_kernels.log_sigmoid import minus_log_sigmoid


@triton.jit
def rank_pairs(  # type: ignore[no-untyped-def]
    scores, better, worse, weights, loss, margins, gradient, num_scores, num_pairs,
    SCORES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write the gradient [s] of SCORES responses from all pairs.

    Program 0 also writes loss [] and margins [p].
    """
    program = tl.program_id(0)
    responses = program * SCORES + tl.arange(0, SCORES)
    pulls = tl.zeros([SCORES, PAIRS], tl.float32)
    losses = tl.zeros([PAIRS], tl.float32)
    first = 0
    while first < num_pairs:  # dpo_loss_kernels.py says why this is no `range`
        pairs = first + tl.arange(0, PAIRS)
        inside = pairs < num_pairs
        b = tl.load(better + pairs, mask=inside, other=-1)
        w = tl.load(worse + pairs, mask=inside, other=-1)
        weight = tl.load(weights + pairs, mask=inside, other=0.0)
        margin = tl.load(scores + b, mask=inside, other=0.0) - tl.load(scores + w, mask=inside, other=0.0)
        pull = weight * tl.sigmoid(-margin)
        pulls += tl.where(w[None, :] == responses[:, None], pull[None, :], 0.0)
        pulls -= tl.where(b[None, :] == responses[:, None], pull[None, :], 0.0)
        if program == 0:
            tl.store(margins + pairs, margin, mask=inside)
            losses += weight * minus_log_sigmoid(margin)
        first += PAIRS
    tl.store(gradient + responses, tl.sum(pulls, 1), mask=responses < num_scores)
    if program == 0:
        tl.store(loss, tl.sum(losses))
