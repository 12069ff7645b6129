"""The binary cross-entropy of steps is a sum and a count, and its labels come from the roles of tokens."""

from math import exp, log

import numpy as np
import pytest
import torch

from megatron_post.data.pack import pack_of_segments
from megatron_post.data.template import Rendered, TokenRole
from megatron_post.stages.step_reward import StepReward, step_loss

BODY, RIGHT, WRONG = TokenRole.BODY, TokenRole.RIGHT_STEP, TokenRole.WRONG_STEP
NAN = float("nan")


def test_worked_by_hand() -> None:
    """A right step of score ln 3 has the probability 3/4, and a wrong one of score 0 has 1/2.

    The loss is -ln(3/4) - ln(1/2) = ln(8/3). The gradients are 3/4 - 1 = -1/4 and 1/2 - 0 = 1/2.
    """
    scores = torch.tensor([log(3), NAN, 0.0], dtype=torch.float64, requires_grad=True)
    loss, count = step_loss(scores, torch.tensor([1, 0, 0]), torch.tensor([True, False, True]))
    loss.backward()
    assert loss.item() == pytest.approx(log(8 / 3), rel=1e-12)
    assert (count.item(), count.dtype) == (2, torch.int32)
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([-0.25, 0.0, 0.5], rel=1e-12)


def test_a_rank_without_steps() -> None:
    scores = torch.tensor([NAN, 2.0], requires_grad=True)
    loss, count = step_loss(scores, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert scores.grad is not None
    assert (loss.item(), count.item(), scores.grad.tolist()) == (0.0, 0, [0.0, 0.0])


def test_large_scores_have_a_finite_loss() -> None:
    """A wrong step of score 200 has the loss 200, although its sigmoid rounds to 1."""
    loss, _ = step_loss(torch.tensor([200.0]), torch.tensor([0]), torch.tensor([True]))
    assert loss.item() == 200.0


def test_gradient() -> None:
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    labels, trained = torch.tensor([1, 0, 1, 0, 1, 0]), torch.tensor([1, 1, 0, 0, 1, 1], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: step_loss(x, labels, trained)[0], scores)


def test_labels_and_metrics_of_a_pack() -> None:
    """Two solutions of three and two steps. One step has no label. One has a score of 0, which is a tie."""
    roles = [[BODY, RIGHT, WRONG, BODY], [RIGHT, BODY, WRONG]]
    segments = [Rendered(np.arange(len(r), dtype=np.int32), np.array(r, dtype=np.uint8)) for r in roles]
    stage = StepReward()
    batch = stage.collate(pack_of_segments(segments, pack_length=12, segment_multiple=4))
    assert batch.trained.nonzero().flatten().tolist() == [1, 2, 4, 6]
    assert batch.labels.nonzero().flatten().tolist() == [1, 4]
    output = torch.full((12,), NAN)
    output[[1, 2, 4, 6]] = torch.tensor([1.0, -1.0, -1.0, 0.0])
    loss, count, metrics = stage.loss(output, batch)
    right, wrong = log(1 + exp(-1)), log(1 + exp(1))
    assert loss.item() == pytest.approx(2 * right + wrong + log(2), rel=1e-6)
    found = {name: (float(total), float(number)) for name, (total, number) in metrics.items()}
    assert count.item() == 4 and found["accuracy"] == (2.5, 4)
    assert found["accuracy_right"] == (1, 2) and found["accuracy_wrong"] == (1.5, 2)
    p = 1 / (1 + exp(-1))
    assert found["brier"] == pytest.approx((2 * (1 - p) ** 2 + p**2 + 0.25, 4), rel=1e-6)
    assert stage.scores(torch.arange(12.0), batch).tolist() == list(range(12))
