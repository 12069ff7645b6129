"""The reward model: it ranks the responses of an example by a score at each response's last token."""

import dataclasses

import torch
from megatron_post_kernels.ranking_loss import ranking_loss
from torch import Tensor

from megatron_post.config.losses import Reward as RewardConfig
from megatron_post.data.batch import PackedBatch, batch_of_pack, on_device
from megatron_post.data.pack import Pack
from megatron_post.stages.base import Metrics
from megatron_post.stages.comparisons import SegmentSums, behind_prompts, compare, metric


class Reward:
    """Ranks edited > chosen > rejected. The count is the number of examples.

    So an example with three responses has the same weight as one with two.
    """

    def __init__(self, settings: RewardConfig, sums: SegmentSums) -> None:
        self._layout, self._sums = settings.layout, sums

    def collate(self, pack: Pack) -> PackedBatch:
        """Tensors of a pack. `trained` marks the last real token of each segment, whose score is used."""
        batch = batch_of_pack(pack, torch.empty(0, dtype=torch.long))
        # A last segment of padding has no real token. Its first token is marked, and its score is never used.
        last = batch.cu_seqlens[:-1].long() + (batch.lengths.long() - 1).clamp(min=0)
        trained = torch.zeros_like(batch.trained)
        trained[on_device(last, trained.device)] = True
        batch = dataclasses.replace(batch, trained=trained, comparisons=compare(pack))
        return (
            batch
            if self._layout == "separate"
            else behind_prompts(batch, pack, blind=self._layout == "isolated")
        )

    def scores(self, output: Tensor, batch: PackedBatch) -> Tensor:
        """output: scores fp32 [t / cp] of every token. Returns fp32 [n], the score of each segment."""
        at_last = torch.where(batch.trained, output, torch.zeros_like(output))
        return self._sums(at_last[None], batch.segments, count=len(batch.lengths))[0]

    def loss(self, output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Metrics]:
        """output: scores fp32 [t / cp] of every token."""
        pairs = batch.comparisons
        assert pairs is not None
        scores = self.scores(output, batch)
        loss_sum, margins = ranking_loss(scores, pairs.better, pairs.worse, pairs.weights)
        loss_sum, count = self._sums.counted(loss_sum, pairs.examples.to(torch.int32))
        counted = torch.full_like(margins, float(self._sums.is_counted))
        confidence = torch.sigmoid(margins)
        metrics: Metrics = {
            "loss": (loss_sum.detach(), count),
            "accuracy": metric(_wins(margins), counted * pairs.weights),
            "margin": metric(margins, counted * pairs.weights),
            # These two measure calibration. A confidence above the accuracy means an overconfident model. The
            # Brier score grows with overconfidence and with underconfidence.
            "confidence": metric(torch.maximum(confidence, 1 - confidence), counted * pairs.weights),
            "brier": metric((1 - confidence) ** 2, counted * pairs.weights),
        }
        for name, better, worse in (
            ("edited_chosen", 0, 1),
            ("chosen_rejected", 1, 2),
            ("edited_rejected", 0, 2),
        ):
            chosen = (pairs.ranks[:, 0] == better) & (pairs.ranks[:, 1] == worse) & (pairs.weights < 1)
            metrics[f"accuracy_{name}"] = metric(_wins(margins), counted * chosen)
        return loss_sum, count, metrics


def _wins(margins: Tensor) -> Tensor:
    """1 if the better response has the higher score, and 1/2 for a tie."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()
