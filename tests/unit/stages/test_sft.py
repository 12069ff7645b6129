"""Cross-entropy of trained tokens: sums and counts, never means."""

import torch

from megatron_post.stages.sft import sft_loss


def test_worked_by_hand() -> None:
    """-(-1) + -(-4) = 5 over two trained tokens; each pulls with -1, the untrained one not at all."""
    logps = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    loss, count = sft_loss(logps, torch.tensor([True, False, True]))
    loss.backward()
    assert (loss.item(), count.item(), count.dtype) == (5.0, 2, torch.int32)
    assert logps.grad.tolist() == [-1.0, 0.0, -1.0]


def test_nothing_trained() -> None:
    """A context-parallel rank may hold padding alone: 0 of 0, and gradients that are zero and not missing."""
    logps = torch.tensor([-1.0, float("nan")], requires_grad=True)
    loss, count = sft_loss(logps, torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert (loss.item(), count.item()) == (0.0, 0)
    assert logps.grad.tolist() == [0.0, 0.0]


def test_untrained_values_do_not_matter() -> None:
    """NaN and infinity where no loss is: a mask that multiplies would give NaN, forward or backward."""
    logps = torch.tensor([float("nan"), -3.0, float("-inf")], requires_grad=True)
    loss, count = sft_loss(logps, torch.tensor([False, True, False]))
    loss.backward()
    assert (loss.item(), count.item()) == (3.0, 1)
    assert logps.grad.tolist() == [0.0, -1.0, 0.0]


def test_gradient() -> None:
    logps = torch.randn(7, dtype=torch.float64, requires_grad=True)
    trained = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, trained)[0], logps)
