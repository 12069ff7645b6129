"""Direct preference optimisation on packed pairs, against a reference's log-probabilities of the same
tokens."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from megatron_post.config.schema import DPO as DPOConfig
from megatron_post.data.batch import PackedBatch, batch_of_pack, role_numbers
from megatron_post.data.store import Pack
from megatron_post.losses.preference import LOSSES, LossSettings, PairLogps, chosen_nll
from megatron_post.stages.base import Metrics
from megatron_post.stages.comparisons import SegmentSums, compare, metric


class DPO:
    """The chosen loss over pairs, plus the NLL of the chosen response. Counts pairs."""

    head: Literal["lm"] = "lm"

    def __init__(self, settings: DPOConfig, sums: SegmentSums) -> None:
        self._settings, self._sums = settings, sums
        self._pair_loss = LOSSES[settings.loss]
        self._loss_settings = LossSettings(settings.beta, settings.label_smoothing, settings.margin)
        self._trained_roles = role_numbers(settings.trained_roles)
        self.needs_reference = settings.needs_reference

    def collate(self, pack: Pack) -> PackedBatch:
        """Of the history before the compared responses nothing is trained: its roles are all prompt."""
        return dataclasses.replace(batch_of_pack(pack, self._trained_roles), comparisons=compare(pack))

    def loss(self, output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Metrics]:
        """output: logps fp32 [t / cp] of the labels."""
        pairs, settings = batch.comparisons, self._settings
        assert pairs is not None
        logps, kl = self._pair_logps(output, batch)
        losses = self._pair_loss(logps, self._loss_settings)
        nll = chosen_nll(
            logps.chosen, logps.chosen_lengths, per_token=settings.nll_normalization == "per_token"
        )
        loss_sum, count = self._sums.counted(
            (losses + settings.nll_weight * nll).sum(), pairs.examples.to(torch.int32)
        )
        counted = torch.full_like(losses, float(self._sums.is_counted))
        chosen_reward = settings.beta * (logps.chosen - logps.reference_chosen)
        rejected_reward = settings.beta * (logps.rejected - logps.reference_rejected)
        return (
            loss_sum,
            count,
            {
                "loss": (loss_sum.detach(), count),
                "preference_loss": metric(losses, counted),
                "nll": metric(nll, counted),
                "reward_chosen": metric(chosen_reward, counted),
                "reward_rejected": metric(rejected_reward, counted),
                "margin": metric(chosen_reward - rejected_reward, counted),
                "accuracy": metric((chosen_reward > rejected_reward).float(), counted),
                "logps_chosen": metric(logps.chosen, counted),
                "logps_rejected": metric(logps.rejected, counted),
                "kl": metric(kl, counted),
            },
        )

    def _pair_logps(self, output: Tensor, batch: PackedBatch) -> tuple[PairLogps, Tensor]:
        """Sums over the trained tokens of each pair's responses, and an estimate of KL(policy || reference) a
        token.

        The estimate is Schulman's k3, mean of ref/pi - 1 - log(ref/pi) over the tokens of both responses:
        exact in expectation only where the responses are the policy's own.
        """
        pairs, trained = batch.comparisons, batch.trained
        assert pairs is not None
        reference = output.detach() if batch.reference_logps is None else batch.reference_logps
        zero = torch.zeros_like(output)
        policy, fixed = torch.where(trained, output, zero), torch.where(trained, reference, zero)
        log_ratio = (fixed - policy).detach()
        rows = torch.stack((policy, fixed, trained.float(), log_ratio.exp() - 1 - log_ratio))
        sums = self._sums(rows, batch.segments, count=len(batch.lengths))
        (policy_sum, fixed_sum, lengths, kl), c, r = sums, pairs.better, pairs.worse
        logps = PairLogps(
            chosen=policy_sum[c],
            rejected=policy_sum[r],
            reference_chosen=fixed_sum[c].detach(),
            reference_rejected=fixed_sum[r].detach(),
            chosen_lengths=lengths[c].detach(),
            rejected_lengths=lengths[r].detach(),
        )
        return logps, (kl[c] + kl[r]) / (lengths[c] + lengths[r]).clamp(min=1)
