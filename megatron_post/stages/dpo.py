"""Direct preference optimisation on packed pairs, with a reference's log-probabilities of the same tokens."""

import dataclasses

import torch
from megatron_post_kernels.dpo_loss import dpo_loss
from megatron_post_kernels.pair_losses import DPOSettings
from torch import Tensor

from megatron_post.config.losses import DPO as DPOConfig
from megatron_post.data.batch import PackedBatch, batch_of_pack, role_numbers
from megatron_post.data.pack import Pack
from megatron_post.stages.base import Metrics
from megatron_post.stages.comparisons import SegmentSums, behind_prompts, compare, metric


class DPO:
    """The preference loss over pairs, plus the NLL of the chosen response.

    The count is the number of pairs.
    """

    def __init__(self, settings: DPOConfig, sums: SegmentSums) -> None:
        self._sums, self._shares_prompts = sums, settings.layout == "isolated"
        self._settings = DPOSettings(
            loss=settings.loss,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            margin=settings.margin,
            nll_weight=settings.nll_weight,
            nll_per_token=settings.nll_normalization == "per_token",
        )
        self._trained_roles = role_numbers(settings.trained_roles)

    def collate(self, pack: Pack) -> PackedBatch:
        """Tensors of a pack with its pairs.

        The history before the responses has the role prompt, untrained. If both responses share it, each of
        them begins with the last token of the prompt.
        """
        batch = batch_of_pack(pack, self._trained_roles)
        batch = dataclasses.replace(batch, comparisons=compare(pack, best_and_worst=True))
        return behind_prompts(batch, pack, blind=True) if self._shares_prompts else batch

    def loss(self, output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Metrics]:
        """output: logps fp32 [t / cp] of the labels."""
        pairs = batch.comparisons
        assert pairs is not None
        terms = dpo_loss(
            output,
            batch.reference_logps,
            batch.trained,
            cu_seqlens=self._sums.local_offsets(batch.cu_seqlens),
            chosen=pairs.better,
            rejected=pairs.worse,
            settings=self._settings,
            sum_over_context=self._sums.over_context,
        )
        loss_sum, count = self._sums.counted(terms.loss.sum(), pairs.examples.to(torch.int32))
        counted = torch.full_like(terms.nll, float(self._sums.is_counted))
        margins = terms.reward_chosen - terms.reward_rejected
        metrics: Metrics = {
            "loss": (loss_sum.detach(), count),
            "preference_loss": metric(terms.preference_loss, counted),
            "nll": metric(terms.nll, counted),
            "reward_chosen": metric(terms.reward_chosen, counted),
            "reward_rejected": metric(terms.reward_rejected, counted),
            "margin": metric(margins, counted),
            "accuracy": metric((margins > 0).float(), counted),
            "logps_chosen": metric(terms.logps_chosen, counted),
            "logps_rejected": metric(terms.logps_rejected, counted),
            "kl": metric(terms.kl, counted),
        }
        return loss_sum, count, metrics
