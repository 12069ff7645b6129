"""Reward model: a scalar at each response's last token, ranked within an example."""

import dataclasses
from typing import Literal

import torch
from megatron_post_kernels.ranking_loss import ranking_loss
from torch import Tensor

from megatron_post.config.schema import Reward as RewardConfig
from megatron_post.data.batch import PackedBatch, batch_of_pack
from megatron_post.data.pack import Pack
from megatron_post.stages.base import Metrics
from megatron_post.stages.comparisons import SegmentSums, compare, metric


class Reward:
    """Ranks edited > chosen > rejected. Counts examples: one of three responses weighs as one of two."""

    head: Literal["scalar"] = "scalar"
    needs_reference = False

    def __init__(self, settings: RewardConfig, sums: SegmentSums) -> None:
        self._layout, self._sums = settings.layout, sums

    def collate(self, pack: Pack) -> PackedBatch:
        """`trained` marks the last real token of each segment, where its score is read."""
        batch = batch_of_pack(pack, torch.empty(0, dtype=torch.long))
        # a tail of padding has no last real token; its score goes nowhere
        last = batch.cu_seqlens[:-1].long() + (batch.lengths.long() - 1).clamp(min=0)
        trained = torch.zeros_like(batch.trained)
        trained[last] = True
        batch = dataclasses.replace(batch, trained=trained, comparisons=compare(pack))
        return (
            batch
            if self._layout == "separate"
            else _behind_prompt(batch, pack, blind=self._layout == "isolated")
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
            # calibration: where confidence is above accuracy the model is too sure; Brier punishes both
            # errors
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
    """1 where the better response has the higher score, 1/2 for a tie."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def _behind_prompt(batch: PackedBatch, pack: Pack, *, blind: bool) -> PackedBatch:
    """Responses continue the prompt's segment that stands before them.

    blind: each sees the prompt alone and its positions go on from the prompt's end. Otherwise each sees, and
    stands behind, the responses before it too.
    """
    seen = torch.zeros(len(pack.ranks), 2, dtype=torch.long)
    offsets = torch.zeros(len(pack.ranks), dtype=torch.long)
    prompt = 0
    for segment, rank in enumerate(pack.ranks.tolist()):
        if rank < 0:
            prompt = segment
            continue
        last = prompt + 1 if blind else segment
        seen[segment] = torch.tensor((prompt, last))
        offsets[segment] = int(pack.lengths[prompt:last].sum())
    device = batch.tokens.device
    positions = batch.positions + offsets.to(device)[batch.segments]
    return dataclasses.replace(batch, seen=seen.to(device), positions=positions)
