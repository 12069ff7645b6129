"""Outlier scores worked out by hand, names of samples, and slow ranks."""

import math
from dataclasses import astuple
from pathlib import Path
from unittest import mock

import pytest

from megatron_post.plan.fake_ranks import fake_rank
from megatron_post.plan.flops import Load
from megatron_post.train import guard
from megatron_post.train.guard import Guard
from megatron_post.train.health import FEWEST, Outliers, not_finite, samples_of
from megatron_post.train.heartbeat import WINDOW, Stragglers
from megatron_post.train.rank_status import RankStatus
from megatron_post.train.signals import StopRequest
from tests.tiny import tiny_config, tiny_packs


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
    assert lines[-1] is not None and "steps: rank 2 (1.700 s). The median" in lines[-1]
    assert [stragglers.add([1.0, 1.1, 1.2]) for _ in range(WINDOW)] == [None] * WINDOW


def test_the_load_of_all_ranks(tmp_path: Path) -> None:
    """Two replicas of two ranks have packs of 100 and 60 tokens. A rank's packs are its peer's too."""
    config = tiny_config(tmp_path, parallel={"tensor": 2})
    loads = [Load(100, 5000, 40), Load(100, 5000, 40), Load(60, 1800, 9), Load(60, 1800, 9)]
    statuses = [RankStatus(False, False, False, 1.0, *astuple(load)) for load in loads]
    with (
        fake_rank(config.parallel, rank=0, world_size=4) as topology,
        mock.patch.object(guard, "gather_statuses", lambda own, _: statuses),
        mock.patch.object(guard, "Skips"),
    ):
        found = Guard(config, topology, StopRequest(), [], mock.Mock())
        found.exchange_status(bad_loss=False, save_failed=False, load=loads[0])
    assert found.load == Load(160, 6800, 49)
