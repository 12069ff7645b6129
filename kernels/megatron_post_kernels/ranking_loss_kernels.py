"""Triton kernel of `ranking_loss`. Imported at the first launch: only then is Triton needed."""

import triton
from triton import language as tl

from megatron_post_kernels.log_sigmoid import minus_log_sigmoid


@triton.jit
def rank_pairs(  # type: ignore[no-untyped-def]
    scores, better, worse, weights, loss, margins, gradient, num_scores, num_pairs,
    SCORES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Gradient [s] of SCORES responses, from all pairs in order; program 0 writes loss [] and margins [p],
    too."""
    program = tl.program_id(0)
    responses = program * SCORES + tl.arange(0, SCORES)
    pulls = tl.zeros([SCORES, PAIRS], tl.float32)
    losses = tl.zeros([PAIRS], tl.float32)
    first = 0
    while first < num_pairs:  # no `range`: see dpo_loss_kernels.py
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
