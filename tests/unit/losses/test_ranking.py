"""-log sigmoid(r_better - r_worse), weighted so that an example weighs one."""

import math

import pytest
import torch

from megatron_post.losses.ranking import ranking_loss


def test_worked_by_hand() -> None:
    """Margins 1, 0 and -2: log(1 + e^-1) = 0.31326, log 2 = 0.69315, log(1 + e^2) = 2.12693. With weights 1,
    1/2 and 1/2 the sum is 0.31326 + 0.34657 + 1.06346 = 1.72330. A pair pulls its better score up by weight x
    sigmoid(-margin): 0.26894, 1/2 x 0.5 and 1/2 x 0.88080, and the worse one down by as much."""
    better = torch.tensor([2.0, 3.0, -1.0], requires_grad=True)
    worse = torch.tensor([1.0, 3.0, 1.0], requires_grad=True)
    loss, margins = ranking_loss(better, worse, torch.tensor([1.0, 0.5, 0.5]))
    loss.backward()
    assert loss.item() == pytest.approx(1.72330, abs=1e-5)
    assert margins.tolist() == [1.0, 0.0, -2.0]
    pull = torch.tensor([0.26894, 0.25, 0.44040])
    torch.testing.assert_close(better.grad, -pull, atol=1e-5, rtol=0)
    torch.testing.assert_close(worse.grad, pull, atol=1e-5, rtol=0)


def test_three_responses_weigh_as_two() -> None:
    """With equal scores the three pairs of an example of three give ln 2 in all, as one pair does."""
    equal = torch.full((3,), 0.7)
    three, _ = ranking_loss(equal, equal, torch.full((3,), 1 / 3))
    two, _ = ranking_loss(equal[:1], equal[:1], torch.ones(1))
    assert three.item() == pytest.approx(math.log(2)) and two.item() == pytest.approx(math.log(2))


def test_large_margins_stay_finite() -> None:
    """log(1 + e^1000) is 1000 and not infinite; the other way it is 0, with gradients -1 and 0."""
    better = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss, _ = ranking_loss(better, torch.tensor([500.0, -500.0]), torch.ones(2))
    loss.backward()
    assert loss.item() == 1000.0
    assert better.grad.tolist() == [-1.0, 0.0]


def test_no_pairs() -> None:
    """A pack of padding: 0, with zero gradients."""
    scores = torch.zeros(0, requires_grad=True)
    loss, margins = ranking_loss(scores, scores, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0 and len(margins) == len(scores.grad) == 0


def test_gradient() -> None:
    better, worse = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda b, w: ranking_loss(b, w, weights)[0], (better, worse))
