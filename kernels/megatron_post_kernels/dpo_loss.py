"""Direct preference optimisation: a loss for each pair from per-token log-probabilities.

With S(y) the sum of log pi over the trained tokens of response y, R(y) the reference's, n(y) their number,
chosen response c and rejected response r of a pair:
    loss = f(S, R, n) + nll_weight x NLL(c)
where f is one of the losses in pair_losses.py, and NLL(c) is -S(c) / n(c) or -S(c). So d loss / d log
pi(token) is the same number for all trained tokens of a response. The kernels store two slopes for each pair,
and no gradient for each token.

If one rank has all tokens, the forward pass is one launch. One program per pair sums both responses and
computes the loss, its slopes and the metrics. With context parallelism, one program per segment sums this
rank's tokens, the sums are added over the ranks, and one program per pair does the rest. The backward pass is
one launch. One program per segment writes its slope times the upstream gradient to trained tokens, and zero
to the others. Each sum is computed by one program in a fixed order, so results do not depend on the schedule
of a launch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_post_kernels.implementation import Implementation, resolve
from megatron_post_kernels.pair_losses import LOSSES, DPOSettings, PairLogps, chosen_nll

# Ratios above e^60 in the estimate of the KL could overflow a sum in fp32, and the metric would be infinite.
MAX_LOG_RATIO = 60.0
_TOKENS = 1024  # a program processes so many tokens at a time, which are 8 per thread
_PAIRS = 128  # a program searches so many pairs at a time for its segment
_NUM_WARPS = 4


@dataclass(frozen=True)
class PairTerms:
    """The loss and metrics of each pair, fp32 [p]. Only `loss` has a gradient.

    loss = preference_loss + nll_weight x nll. The rewards are beta x (S - R), and logps are S. kl is
    Schulman's k3 estimate of KL(policy || reference), the mean of ref/pi - 1 - log(ref/pi) over the tokens of
    both responses. Its expectation is exact only if the policy has generated the responses.
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
    """Sums over each segment's trained tokens: S, R, the number of tokens and the sum of k3. Returns [4, s].

    Without a reference, R is a constant equal to S. On a GPU `index_add` has no fixed order of summation,
    unlike the kernel.
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
    """The loss and metrics of each pair. sums: [4, s] from `segment_sums`.

    chosen, rejected: int64 [p], segments.
    """
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

    logps, reference_logps: fp32 [t/cp]. Untrained tokens may have any value, including NaN. Without a
    reference
      (`simpo`), a constant copy of the policy replaces it. trained: bool [t/cp].
    cu_seqlens: int [s + 1], offsets of the segments among this rank's tokens. With context parallelism these
      are the pack's offsets / cp, because a rank has an equal share of each segment.
    chosen, rejected: int64 [p], segments, identical on every rank. A segment may be in several pairs or in
    none. sum_over_context: a differentiable function that sums a tensor over the context-parallel ranks and
    is its
      own adjoint, or None if one rank has all tokens. Every rank then has complete losses and metrics, so the
      caller must count them on one rank only.
    Raises `ValueError` for an unknown loss, for a policy that is not fp32 with the kernels, and if `impl`
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
    """(losses [p], metrics [7, p]), computed by the kernels."""

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
            # Every rank has the same slopes. Only the upstream gradients differ, because one rank counts the
            # loss. The sum gives that rank's gradient to all of them.
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
