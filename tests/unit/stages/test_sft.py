"""The cross-entropy of trained tokens is a sum and a count, and not a mean."""

import torch

from megatron_post.stages.sft import sft_loss


def test_worked_by_hand() -> None:
    """-(-1) + -(-4) = 5 over two trained tokens. Their gradients are -1, and the untrained token's is 0."""
    logps = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    loss, count = sft_loss(logps, torch.tensor([True, False, True]))
    loss.backward()
    assert (loss.item(), count.item(), count.dtype) == (5.0, 2, torch.int32)
    assert logps.grad.tolist() == [-1.0, 0.0, -1.0]


def test_a_rank_without_trained_tokens() -> None:
    """A context-parallel rank may hold only padding. The result is 0 of 0, and gradients exist and are 0."""
    logps = torch.tensor([-1.0, float("nan")], requires_grad=True)
    loss, count = sft_loss(logps, torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert (loss.item(), count.item()) == (0.0, 0)
    assert logps.grad.tolist() == [0.0, 0.0]


def test_untrained_values_do_not_matter() -> None:
    """Untrained tokens are NaN and infinity. Multiplying by a mask would give NaN, forward or backward."""
    logps = torch.tensor([float("nan"), -3.0, float("-inf")], requires_grad=True)
    loss, count = sft_loss(logps, torch.tensor([False, True, False]))
    loss.backward()
    assert (loss.item(), count.item()) == (3.0, 1)
    assert logps.grad.tolist() == [0.0, -1.0, 0.0]


def test_gradient() -> None:
    logps = torch.randn(7, dtype=torch.float64, requires_grad=True)
    trained = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, trained)[0], logps)
