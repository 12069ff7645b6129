"""The ranking loss in torch and in the kernel. Each example has a total weight of one."""

import math
import random

import pytest
import torch
from megatron_post_kernels.implementation import Implementation
from megatron_post_kernels.ranking_loss import ranking_loss, ranking_loss_torch
from torch import Tensor

from tests.kernels.interpreter import kernel_device, on_kernels

IMPLEMENTATIONS: list[Implementation] = ["torch", "triton"]


def _ranked(
    impl: Implementation, scores: list[float], better: list[int], worse: list[int], weights: list[float]
) -> tuple:
    """Loss, margins and gradient of the scores."""
    device = kernel_device()
    leaf = torch.tensor(scores, device=device, requires_grad=True)
    b, w = (torch.tensor(numbers, dtype=torch.long, device=device) for numbers in (better, worse))
    loss, margins = ranking_loss(leaf, b, w, torch.tensor(weights, device=device), impl=impl)
    loss.backward()
    assert leaf.grad is not None and not margins.requires_grad
    return loss.item(), margins.tolist(), leaf.grad.tolist()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@on_kernels
def test_worked_by_hand(impl: Implementation) -> None:
    """Margins 1, 0 and -2 have the losses 0.31326, log 2 = 0.69315 and log(1 + e^2) = 2.12693.

    With weights 1, 1/2 and 1/2 the sum is 0.31326 + 0.34657 + 1.06346 = 1.72330. A pair pulls its better
    score up by weight x sigmoid(-margin), which is 0.26894, 1/2 x 0.5 and 1/2 x 0.88080, and its worse score
    down by as much. Response 3 is the worse one of one pair and the better one of the next. Response 2 is in
    no pair.
    """
    scores = [2.0, 1.0, 9.0, 1.0, 1.0, 3.0]
    loss, margins, gradient = _ranked(impl, scores, [0, 4, 3], [1, 3, 5], [1.0, 0.5, 0.5])
    assert loss == pytest.approx(1.72330, abs=1e-5)
    assert margins == [1.0, 0.0, -2.0]
    assert gradient == pytest.approx([-0.26894, 0.26894, 0.0, 0.25 - 0.44040, -0.25, 0.44040], abs=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@on_kernels
def test_three_responses_weigh_as_two(impl: Implementation) -> None:
    """With equal scores the three pairs of an example of three responses give ln 2 in total, like one pair.

    The best score is pulled up by 2/3 x 1/2, the worst is pulled down by as much, and the middle one stays.
    """
    three, _, gradient = _ranked(impl, [0.7] * 3, [0, 0, 1], [1, 2, 2], [1 / 3] * 3)
    two, _, _ = _ranked(impl, [0.7] * 2, [0], [1], [1.0])
    assert three == pytest.approx(math.log(2)) and two == pytest.approx(math.log(2))
    assert gradient == pytest.approx([-1 / 3, 0.0, 1 / 3])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@on_kernels
def test_large_margins_stay_finite(impl: Implementation) -> None:
    """log(1 + e^20000) is 20000 and not infinite. In the other order it is 0. The gradients are -1 and 0.

    A margin of 20 gives log(1 + e^-20) = 2.0611536e-9. In fp32 the sum 1 + e^-20 alone would round to 1.
    """
    loss, _, gradient = _ranked(impl, [-1e4, 1e4], [0], [1], [1.0])
    assert loss == 20000.0 and gradient == [-1.0, 1.0]
    loss, _, gradient = _ranked(impl, [1e4, -1e4], [0], [1], [1.0])
    assert loss == 0.0 and gradient == [0.0, 0.0]
    loss, _, _ = _ranked(impl, [10.0, -10.0], [0], [1], [1.0])
    assert loss == pytest.approx(2.0611536e-9, rel=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@on_kernels
def test_no_pairs(impl: Implementation) -> None:
    """A pack of padding has the loss 0 and zero gradients for any score."""
    assert _ranked(impl, [math.nan], [], [], []) == (0.0, [], [0.0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@on_kernels
def test_against_loops(impl: Implementation) -> None:
    """150 examples of 2 or 3 shuffled responses fill more than a block of pairs and of responses.

    Prompts and NaN padding lie between them. The loops are in double precision. fp32 sums of about 250 pairs
    of about 1 have a relative error of 1e-6.
    """
    draw = random.Random(0)
    scores: list[float] = []
    better, worse, weights = [], [], []
    for number in range(150):
        scores.append(math.nan)
        segments = list(range(len(scores), len(scores) + 2 + number % 2))
        scores += [torch.tensor(draw.gauss(0, 2)).item() for _ in segments]
        draw.shuffle(segments)
        pairs = [(a, b) for i, a in enumerate(segments) for b in segments[i + 1 :]]
        better += [a for a, _ in pairs]
        worse += [b for _, b in pairs]
        weights += [1 / len(pairs)] * len(pairs)
    loss, margins, gradient = _ranked(impl, scores, better, worse, weights)
    expected, expected_gradient = 0.0, [0.0] * len(scores)
    for a, b, weight in zip(better, worse, weights, strict=True):
        expected += weight * math.log1p(math.exp(scores[b] - scores[a]))
        pull = weight / (1 + math.exp(scores[a] - scores[b]))
        expected_gradient[a] -= pull
        expected_gradient[b] += pull
    assert len(better) > 128
    assert loss == pytest.approx(expected, rel=2e-6)
    assert margins == pytest.approx(
        [scores[a] - scores[b] for a, b in zip(better, worse, strict=True)], abs=1e-6
    )
    assert gradient == pytest.approx(expected_gradient, abs=3e-7)


@on_kernels
def test_upstream_gradient_scales() -> None:
    """Both implementations are followed by a factor of -3."""
    found = []
    for impl in IMPLEMENTATIONS:
        scores = torch.linspace(-2, 2, 6, device=kernel_device()).requires_grad_()
        better, worse = torch.tensor([[0, 3, 5], [1, 2, 4]], device=scores.device)
        loss, _ = ranking_loss(scores, better, worse, torch.ones(3, device=scores.device), impl=impl)
        (-3 * loss).backward()
        found.append(scores.grad)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_gradient_of_the_reference() -> None:
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    better, worse = torch.tensor([[0, 0, 1, 4], [1, 2, 2, 3]])
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0], dtype=torch.float64)

    def loss(scores: Tensor) -> Tensor:
        return ranking_loss_torch(scores, better, worse, weights)[0]

    assert torch.autograd.gradcheck(loss, (scores,))


@on_kernels
def test_bf16_scores_are_refused() -> None:
    """Differences of scores in bf16 have only 8 bits, so the caller must convert such scores explicitly."""
    scores = torch.zeros(2, dtype=torch.bfloat16, device=kernel_device())
    better, worse = torch.tensor([[0], [1]], device=kernel_device())
    with pytest.raises(ValueError, match=r"bfloat16.*call \.float"):
        ranking_loss(scores, better, worse, torch.ones(1, device=kernel_device()), impl="triton")
