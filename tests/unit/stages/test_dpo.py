"""The loss of the DPO stage under masks, empty packs and units of three responses."""

import math
from dataclasses import replace

import pytest
import torch
from megatron_post_kernels.pair_losses import LOSSES
from torch import Tensor

from megatron_post.config.losses import DPO as DPOConfig
from megatron_post.data.batch import PackedBatch
from megatron_post.stages.comparisons import SegmentSums
from megatron_post.stages.dpo import DPO
from tests.comparisons import examples, packs

NAN = float("nan")


def _stage_loss(
    output: Tensor, batch: PackedBatch, *, name: str = "sigmoid"
) -> tuple[float, int, dict[str, float]]:
    """Loss, count and metric sums of one pack on one rank. `output` receives gradients."""
    stage = DPO(DPOConfig(loss=name), SegmentSums())  # type: ignore[arg-type]
    loss, count, metrics = stage.loss(output, batch)
    loss.backward()
    return loss.item(), int(count), {key: float(value) for key, (value, _) in metrics.items()}


def _batch() -> PackedBatch:
    (pack,) = packs(examples(3), counts=[3], layout="separate")
    return DPO(DPOConfig(), SegmentSums()).collate(pack)


@pytest.mark.parametrize("name", LOSSES)
def test_untrained_values_do_not_matter(name: str) -> None:
    """Policy and reference are NaN at all untrained tokens. The loss does not change, and gradients are 0."""
    batch = _batch()
    torch.manual_seed(0)
    clean = (-5 * torch.rand(len(batch.tokens))).requires_grad_()
    reference = -5 * torch.rand(len(batch.tokens))
    expected = _stage_loss(clean, replace(batch, reference_logps=reference), name=name)
    nan = torch.full_like(reference, NAN)
    dirty = torch.where(batch.trained, clean.detach(), nan).requires_grad_()
    masked = replace(batch, reference_logps=torch.where(batch.trained, reference, nan))
    assert _stage_loss(dirty, masked, name=name) == expected
    assert torch.equal(dirty.grad, clean.grad)
    assert not dirty.grad[~batch.trained].any() and dirty.grad[batch.trained].all()


def test_pairs_without_trained_tokens() -> None:
    """Each pair gives the loss ln 2 + 0.2 x 0, and all gradients are 0."""
    batch = _batch()
    batch = replace(batch, trained=torch.zeros_like(batch.trained))
    output = torch.full((len(batch.tokens),), NAN, requires_grad=True)
    loss, count, metrics = _stage_loss(output, batch)
    assert loss == pytest.approx(3 * math.log(2)) and count == 3
    assert metrics["nll"] == metrics["margin"] == metrics["kl"] == 0.0
    assert output.grad.tolist() == [0.0] * len(output)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pack_without_pairs(name: str) -> None:
    """A pack of padding, which fills up the last group of packs, gives 0 of 0 and zero gradients."""
    (pack,) = packs([], counts=[0], layout="separate")
    batch = DPO(DPOConfig(), SegmentSums()).collate(pack)
    output = torch.full((len(batch.tokens),), NAN, requires_grad=True)
    loss, count, metrics = _stage_loss(output, batch, name=name)
    assert (loss, count) == (0.0, 0) and not any(metrics.values())
    assert output.grad.tolist() == [0.0] * len(output)


def test_dpo_pairs_only_the_best_with_the_worst() -> None:
    """A unit of a reward model's store may have three responses.

    DPO makes one pair of its first and third.
    """
    (pack,) = packs(examples(4, sizes=(3, 2)), counts=[4], layout="separate")
    pairs = DPO(DPOConfig(), SegmentSums()).collate(pack).comparisons
    assert pairs is not None
    assert pairs.ranks.tolist() == [[0, 2], [0, 1], [0, 2], [0, 1]]
    assert pairs.weights.tolist() == [1.0] * 4 and int(pairs.examples) == 4
