"""The memory tracker counts what a few lines allocate, as worked out by hand."""

import torch

from tests.kernels.memory import AllocationTracker


def test_the_peak_counts_what_is_allocated_together() -> None:
    """400 bytes stay allocated, 800 are freed again, and then 1,200 are added, so the peak is 1,600.

    Views and in-place results allocate nothing.
    """
    given = torch.ones(100)
    with AllocationTracker() as tracker:
        kept = given + 1
        torch.cat((given, given))
        kept.view(10, 10).add_(1)
        torch.cat((given, given, kept))
    assert (tracker.peak_bytes, tracker.largest) == (1600, 300)


def test_the_backward_pass_is_tracked() -> None:
    """exp keeps its result of 400 bytes, and the sum has 4.

    The backward pass allocates a gradient for each.
    """
    x = torch.ones(100, requires_grad=True)
    with AllocationTracker() as tracker:
        x.exp().sum().backward()
    assert 1200 > tracker.peak_bytes >= 804
