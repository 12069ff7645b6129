"""Accuracies with their intervals."""

import pytest

from megatron_post.rounds.accuracy import Accuracy


def test_accuracy_by_hand() -> None:
    """For 8 of 10, Wilson's centre is (0.8 + 3.8415 / 20) / 1.38415 = 0.7167, and the half width 0.2267."""
    low, high = Accuracy(8, 10).interval
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert str(Accuracy(8, 10)) == "80.0% (49.0 to 94.3)"
