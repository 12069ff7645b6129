"""Direct preference optimisation: from per-token log-probabilities to a loss a pair.

With S(y) the sum of log pi over the trained tokens of response y, R(y) the reference's, n(y) their number,
chosen response c and rejected response r of a pair:
    loss = f(S, R, n) + nll_weight x NLL(c)
where f is one of pair_losses.py and NLL(c) is -S(c) / n(c) or -S(c). So d loss / d log pi(token) is one
number for all trained tokens of a response: the kernels keep two slopes a pair and no gradient a token.

Where one rank holds all tokens, forward is one launch: a program a pair sums both responses and takes the
loss, its slopes and the metrics. Where context parallelism splits them, a program a segment sums what this
rank holds, the sums are added over the ranks, and a program a pair does the rest. Backward is one launch: a
program a segment writes its slope times the upstream gradient to its trained tokens, zero to the others.
Each sum is taken by one program in a fixed order, so results do not depend on how a launch is scheduled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_post_kernels.implementation import Implementation, resolve
from megatron_post_kernels.pair_losses import LOSSES, DPOSettings, PairLogps, chosen_nll

# ratios beyond e^60 in the estimate of KL would overflow fp32 in a sum, and an infinite metric says less
MAX_LOG_RATIO = 60.0
_TOKENS = 1024  # that a program takes at a time: 8 a thread
_PAIRS = 128  # among which a program looks for its segment at a time
_NUM_WARPS = 4


@dataclass(frozen=True)
class PairTerms:
    """What each pair gives, fp32 [p]. Gradients flow from `loss` alone.

    loss = preference_loss + nll_weight x nll; rewards are beta x (S - R); logps are S; kl is Schulman's k3
    estimate of KL(policy || reference), the mean of ref/pi - 1 - log(ref/pi) over the tokens of both
    responses: exact in expectation only where the responses are the policy's own.
    """

    loss: Tensor
    preference_loss: Tensor
    nll: Tensor
    reward_chosen: Tensor
    reward_rejected: Tensor
    logps_chosen: Tensor
    logps_rejected: Tensor
    kl: Tensor


def segment_sums(
    logps: Tensor, reference_logps: Tensor | None, trained: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Sums over the trained tokens of each segment: S, R, their number and the sum of k3. Returns [4, s].

    Without a reference, R is S as a constant. On a GPU `index_add` sums in no fixed order; the kernel's is
    fixed.
    """
    reference = logps.detach() if reference_logps is None else reference_logps
    zero = torch.zeros_like(logps)
    policy, fixed = torch.where(trained, logps, zero), torch.where(trained, reference, zero)
    log_ratio = (fixed - policy).detach()
    k3 = log_ratio.clamp(max=MAX_LOG_RATIO).exp() - 1 - log_ratio
    rows = torch.stack((policy, fixed, trained.to(logps.dtype), k3))
    lengths = cu_seqlens.diff().long()
    numbers = torch.arange(len(lengths), device=logps.device)
    segments = torch.repeat_interleave(numbers, lengths, output_size=len(logps))
    return rows.new_zeros(len(rows), len(lengths)).index_add(1, segments, rows)


def pair_terms(sums: Tensor, chosen: Tensor, rejected: Tensor, settings: DPOSettings) -> PairTerms:
    """sums: [4, s] as `segment_sums` gives them; chosen, rejected: int64 [p], segments."""
    (policy, fixed, lengths, kl), c, r = sums, chosen, rejected
    fixed, lengths, kl = fixed.detach(), lengths.detach(), kl.detach()
    logps = PairLogps(policy[c], policy[r], fixed[c], fixed[r], lengths[c], lengths[r])
    preference = LOSSES[settings.loss](logps, settings)
    nll = chosen_nll(logps.chosen, logps.chosen_lengths, per_token=settings.nll_per_token)
    return PairTerms(
        loss=preference + settings.nll_weight * nll,
        preference_loss=preference.detach(),
        nll=nll.detach(),
        reward_chosen=settings.beta * (logps.chosen - logps.reference_chosen).detach(),
        reward_rejected=settings.beta * (logps.rejected - logps.reference_rejected).detach(),
        logps_chosen=logps.chosen.detach(),
        logps_rejected=logps.rejected.detach(),
        kl=(kl[c] + kl[r]) / (lengths[c] + lengths[r]).clamp(min=1),
    )


def dpo_loss(
    logps: Tensor,
    reference_logps: Tensor | None,
    trained: Tensor,
    *,
    cu_seqlens: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    settings: DPOSettings,
    sum_over_context: Callable[[Tensor], Tensor] | None = None,
    impl: Implementation = "auto",
) -> PairTerms:
    """Loss and metrics of each pair, fp32 [p] each, differentiable in `logps`.

    logps, reference_logps: fp32 [t/cp], of any value, NaN included, where untrained; without a reference
      (`simpo`) the policy, as a constant, stands for it. trained: bool [t/cp].
    cu_seqlens: int [s + 1], where the segments of this rank's tokens begin, and t/cp: under context
      parallelism the pack's offsets / cp, as a rank holds an equal share of each segment.
    chosen, rejected: int64 [p], segments; alike on every rank. One may stand in several pairs or in none.
    sum_over_context: the sum of a tensor over the context-parallel ranks, on each of them, differentiable,
      and its own adjoint; None where one rank holds all tokens. Losses and metrics are then complete on every
      rank: count them on one.
    Raises `ValueError` for an unknown loss, a policy in another dtype than its kernel's, and where `impl`
    cannot run.
    """
    if settings.loss not in LOSSES:
        raise ValueError(f"loss={settings.loss!r}: choose one of {', '.join(LOSSES)}")
    if resolve(impl, logps) == "torch":
        sums = segment_sums(logps, reference_logps, trained, cu_seqlens)
        sums = sums if sum_over_context is None else sum_over_context(sums)
        return pair_terms(sums, chosen, rejected, settings)
    if logps.dtype != torch.float32:
        raise ValueError(
            f"log-probabilities are {logps.dtype}, the kernels take torch.float32: call .float()"
        )
    reference = None if reference_logps is None else reference_logps.float().contiguous()
    tokens = (logps.contiguous(), reference, trained.contiguous(), cu_seqlens.contiguous())
    losses, metrics = _DPOLoss.apply(
        *tokens, chosen.contiguous(), rejected.contiguous(), settings, sum_over_context
    )
    return PairTerms(losses, *metrics)


class _DPOLoss(torch.autograd.Function):
    """(losses [p], metrics [7, p]) by the kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        reference_logps: Tensor | None,
        trained: Tensor,
        cu_seqlens: Tensor,
        chosen: Tensor,
        rejected: Tensor,
        settings: DPOSettings,
        sum_over_context: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        from megatron_post_kernels.dpo_loss_kernels import sum_segments, take_pairs

        num_segments, num_pairs = len(cu_seqlens) - 1, len(chosen)
        tokens = (logps, reference_logps, trained, cu_seqlens)
        constants = {"MAX_LOG_RATIO": MAX_LOG_RATIO, "BLOCK": _TOKENS, "num_warps": _NUM_WARPS}
        losses, metrics = logps.new_empty(num_pairs), logps.new_empty(7, num_pairs)
        slopes = logps.new_empty(2, num_pairs)
        sums = None
        with torch.cuda.device_of(logps):
            if sum_over_context is not None:
                sums = logps.new_empty(4, num_segments)
                sum_segments[(num_segments,)](*tokens, sums, num_segments, **constants)
                sums = sum_over_context(sums)
            take_pairs[(num_pairs,)](
                *tokens,
                sums,
                num_segments,
                chosen,
                rejected,
                losses,
                metrics,
                slopes,
                settings.beta,
                settings.label_smoothing,
                settings.margin,
                settings.nll_weight,
                LOSS=settings.loss,
                NLL_PER_TOKEN=settings.nll_per_token,
                **constants,
            )
        ctx.save_for_backward(slopes, chosen, rejected, trained, cu_seqlens)
        ctx.sum_over_context = sum_over_context
        ctx.mark_non_differentiable(metrics)
        return losses, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        from megatron_post_kernels.dpo_loss_kernels import spread_slopes

        slopes, chosen, rejected, trained, cu_seqlens = ctx.saved_tensors
        upstream = upstream.contiguous()
        if ctx.sum_over_context is not None:
            # the slopes are alike on every rank: where the loss is counted is all that differs
            upstream = ctx.sum_over_context(upstream)
        gradient = slopes.new_empty(len(trained))
        with torch.cuda.device_of(slopes):
            spread_slopes[(len(cu_seqlens) - 1,)](
                upstream,
                slopes,
                chosen,
                rejected,
                len(chosen),
                trained,
                cu_seqlens,
                gradient,
                BLOCK=_TOKENS,
                PAIR_BLOCK=_PAIRS,
                num_warps=_NUM_WARPS,
            )
        return gradient, *[None] * 7
