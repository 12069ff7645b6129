"""Triton kernels of `dpo_loss`. This module is imported at the first launch, which needs Triton.

Untrained tokens are never read, because they may be NaN. Loops are `while` loops, because Triton 3.6's
interpreter (with numpy 2.4) needs constant bounds for `range`, and these bounds differ from pack to pack.
"""

import triton
from triton import language as tl

from megatron_post_kernels.log_sigmoid import minus_log_sigmoid


@triton.jit
def loss_and_slopes(  # type: ignore[no-untyped-def]
    chosen, rejected, fixed_chosen, fixed_rejected, num_chosen, num_rejected, beta, noise, margin,
    LOSS: tl.constexpr,
):  # fmt: skip
    """f of a pair, d f / d S(chosen) and d f / d S(rejected). There is one branch for each of `LOSSES`."""
    ratio_chosen, ratio_rejected = chosen - fixed_chosen, rejected - fixed_rejected
    x = beta * (ratio_chosen - ratio_rejected)
    per_chosen, per_rejected = 1.0 / tl.maximum(num_chosen, 1.0), 1.0 / tl.maximum(num_rejected, 1.0)
    if LOSS == "sigmoid":
        loss, slope = minus_log_sigmoid(x), -beta * tl.sigmoid(-x)
        return loss, slope, -slope
    elif LOSS == "ipo":
        off = ratio_chosen * per_chosen - ratio_rejected * per_rejected - 0.5 / beta
        return off * off, 2.0 * off * per_chosen, -2.0 * off * per_rejected
    elif LOSS == "hinge":
        slope = tl.where(x < 1.0, -beta, 0.0)
        return tl.maximum(1.0 - x, 0.0), slope, -slope
    elif LOSS == "robust":
        share = 1.0 / (1.0 - 2.0 * noise)
        loss = ((1.0 - noise) * minus_log_sigmoid(x) - noise * minus_log_sigmoid(-x)) * share
        slope = -beta * ((1.0 - noise) * tl.sigmoid(-x) + noise * tl.sigmoid(x)) * share
        return loss, slope, -slope
    else:
        tl.static_assert(LOSS == "simpo", "this loss has no branch here")
        y = beta * (chosen * per_chosen - rejected * per_rejected - margin)
        slope = -beta * tl.sigmoid(-y)
        return minus_log_sigmoid(y), slope * per_chosen, -slope * per_rejected


@triton.jit
def _sums_of_tokens(  # type: ignore[no-untyped-def]
    logps, reference, trained, cu_seqlens, segment,
    MAX_LOG_RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S, R, the number of trained tokens and the sum of k3 of one segment, over this rank's tokens."""
    start = tl.load(cu_seqlens + segment).to(tl.int64)
    end = tl.load(cu_seqlens + segment + 1).to(tl.int64)
    policy_sums, fixed_sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    counts, k3_sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    while start < end:
        tokens = start + tl.arange(0, BLOCK)
        counted = tl.load(trained + tokens, mask=tokens < end, other=0) != 0
        policy = tl.load(logps + tokens, mask=counted, other=0.0)
        fixed = policy
        if reference is not None:
            fixed = tl.load(reference + tokens, mask=counted, other=0.0)
        log_ratio = fixed - policy
        policy_sums += policy
        fixed_sums += fixed
        counts += counted.to(tl.float32)
        k3_sums += tl.exp(tl.minimum(log_ratio, MAX_LOG_RATIO)) - 1.0 - log_ratio
        start += BLOCK
    return tl.sum(policy_sums), tl.sum(fixed_sums), tl.sum(counts), tl.sum(k3_sums)


@triton.jit
def sum_segments(  # type: ignore[no-untyped-def]
    logps, reference, trained, cu_seqlens, sums, num_segments,
    MAX_LOG_RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program s writes the sums [4, s] of segment s over this rank's tokens."""
    segment = tl.program_id(0)
    policy, fixed, count, k3 = _sums_of_tokens(
        logps, reference, trained, cu_seqlens, segment, MAX_LOG_RATIO, BLOCK
    )
    tl.store(sums + segment, policy)
    tl.store(sums + num_segments + segment, fixed)
    tl.store(sums + 2 * num_segments + segment, count)
    tl.store(sums + 3 * num_segments + segment, k3)


@triton.jit
def _sums_of_segment(sums, segment, num_segments):  # type: ignore[no-untyped-def]
    here = sums + segment
    return (
        tl.load(here),
        tl.load(here + num_segments),
        tl.load(here + 2 * num_segments),
        tl.load(here + 3 * num_segments),
    )


@triton.jit
def take_pairs(  # type: ignore[no-untyped-def]
    logps, reference, trained, cu_seqlens, sums, num_segments, chosen, rejected, losses, metrics, slopes,
    beta, noise, margin, nll_weight,
    LOSS: tl.constexpr, NLL_PER_TOKEN: tl.constexpr, MAX_LOG_RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p writes losses [p], metrics [7, p] and slopes [2, p] of pair p, from sums [4, s] or tokens."""
    pair, num_pairs = tl.program_id(0), tl.num_programs(0)
    c, r = tl.load(chosen + pair), tl.load(rejected + pair)
    if sums is not None:
        policy_c, fixed_c, count_c, k3_c = _sums_of_segment(sums, c, num_segments)
        policy_r, fixed_r, count_r, k3_r = _sums_of_segment(sums, r, num_segments)
    else:
        policy_c, fixed_c, count_c, k3_c = _sums_of_tokens(
            logps, reference, trained, cu_seqlens, c, MAX_LOG_RATIO, BLOCK
        )
        policy_r, fixed_r, count_r, k3_r = _sums_of_tokens(
            logps, reference, trained, cu_seqlens, r, MAX_LOG_RATIO, BLOCK
        )
    preference, slope_c, slope_r = loss_and_slopes(
        policy_c, policy_r, fixed_c, fixed_r, count_c, count_r, beta, noise, margin, LOSS
    )
    nll_share = 1.0
    if NLL_PER_TOKEN:
        nll_share = 1.0 / tl.maximum(count_c, 1.0)
    nll = -policy_c * nll_share
    tl.store(losses + pair, preference + nll_weight * nll)
    tl.store(slopes + pair, slope_c - nll_weight * nll_share)
    tl.store(slopes + num_pairs + pair, slope_r)
    tl.store(metrics + pair, preference)
    tl.store(metrics + num_pairs + pair, nll)
    tl.store(metrics + 2 * num_pairs + pair, beta * (policy_c - fixed_c))
    tl.store(metrics + 3 * num_pairs + pair, beta * (policy_r - fixed_r))
    tl.store(metrics + 4 * num_pairs + pair, policy_c)
    tl.store(metrics + 5 * num_pairs + pair, policy_r)
    tl.store(metrics + 6 * num_pairs + pair, (k3_c + k3_r) / tl.maximum(count_c + count_r, 1.0))


@triton.jit
def spread_slopes(  # type: ignore[no-untyped-def]
    upstream, slopes, chosen, rejected, num_pairs, trained, cu_seqlens, gradient,
    BLOCK: tl.constexpr, PAIR_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program s writes the gradient [t] of its segment, from slopes [2, p] and upstream gradients [p]."""
    segment = tl.program_id(0)
    slope_sums = tl.zeros([PAIR_BLOCK], tl.float32)
    first = 0
    while first < num_pairs:
        pairs = first + tl.arange(0, PAIR_BLOCK)
        inside = pairs < num_pairs
        is_chosen = tl.load(chosen + pairs, mask=inside, other=-1) == segment
        is_rejected = tl.load(rejected + pairs, mask=inside, other=-1) == segment
        slope_c = tl.load(slopes + pairs, mask=is_chosen, other=0.0)
        slope_r = tl.load(slopes + num_pairs + pairs, mask=is_rejected, other=0.0)
        weight = tl.load(upstream + pairs, mask=is_chosen | is_rejected, other=0.0)
        slope_sums += weight * (slope_c + slope_r)
        first += PAIR_BLOCK
    slope = tl.sum(slope_sums)
    start = tl.load(cu_seqlens + segment).to(tl.int64)
    end = tl.load(cu_seqlens + segment + 1).to(tl.int64)
    while start < end:
        tokens = start + tl.arange(0, BLOCK)
        counted = tl.load(trained + tokens, mask=tokens < end, other=0) != 0
        tl.store(gradient + tokens, tl.where(counted, slope, 0.0), mask=tokens < end)
        start += BLOCK
