"""The memory tracker counts by hand what a few lines allocate."""

import torch

from tests.kernels.memory import AllocationTracker


def test_peak_is_what_lives_at_one_time() -> None:
    """400 bytes live; 800 come and go; then 1,200 join: 1,600. Views and results in place are not memory."""
    given = torch.ones(100)
    with AllocationTracker() as tracker:
        kept = given + 1
        torch.cat((given, given))
        kept.view(10, 10).add_(1)
        torch.cat((given, given, kept))
    assert (tracker.peak_bytes, tracker.largest) == (1600, 300)


def test_backward_is_seen() -> None:
    """exp keeps its result of 400 bytes; the sum has 4; backward makes grad of each, 400 for x itself."""
    x = torch.ones(100, requires_grad=True)
    with AllocationTracker() as tracker:
        x.exp().sum().backward()
    assert 1200 > tracker.peak_bytes >= 804
