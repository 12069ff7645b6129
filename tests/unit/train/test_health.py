"""Outlier scores worked out by hand, names of samples, and slow ranks."""

import math

import pytest

from megatron_post.train.health import FEWEST, Outliers, not_finite, samples_of
from megatron_post.train.heartbeat import WINDOW, Stragglers
from tests.tiny import tiny_packs


def test_outlier_by_hand() -> None:
    """The window holds 1 ten times and 3 ten times.

    The median is 2 and every deviation is 1, so one robust standard deviation is 1.4826. A value of
    2 + 10 x 1.4826 scores 10.
    """
    outliers = Outliers()
    assert {outliers.score(1.0 + 2 * (i % 2)) for i in range(FEWEST)} == {0.0}
    assert outliers.score(2 + 14.826) == pytest.approx(10)


def test_a_spike_does_not_hide_the_next_one() -> None:
    outliers = Outliers()
    for i in range(50):
        outliers.score(1 + 0.01 * (i % 5))
    assert outliers.score(9.0) > 8 and outliers.score(9.0) > 8


def test_a_constant_loss_has_outliers_too() -> None:
    outliers = Outliers()
    for _ in range(FEWEST):
        outliers.score(2.0)
    assert outliers.score(2.0) == 0
    assert outliers.score(2.1) > 8


def test_not_finite() -> None:
    assert not_finite([1.0, math.nan, 0.0, math.inf]) == [1, 3]


def test_samples_of() -> None:
    (pack,) = tiny_packs(1)
    assert samples_of(pack, ["sums"]) == [f"sums:{i}" for i in range(len(pack.lengths))]


def test_the_slow_rank_is_named_once_a_window() -> None:
    stragglers = Stragglers(3)
    lines = [stragglers.add([1.0, 1.1, 1.7]) for _ in range(WINDOW)]
    assert lines[:-1] == [None] * (WINDOW - 1)
    assert lines[-1] is not None and lines[-1].endswith("rank 2 1.700 s")
    assert [stragglers.add([1.0, 1.1, 1.2]) for _ in range(WINDOW)] == [None] * WINDOW
