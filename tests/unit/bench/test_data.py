"""The inputs and figures of the data benchmark."""

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_post.bench import data
from megatron_post.bench.data import (
    Packed,
    data_figures,
    long_tailed_lengths,
    measure_data,
    one_core,
    time_loader,
    time_packing,
)


def test_lengths_follow_the_mix() -> None:
    """The mean is that of the report's table, less a little because the longest lengths are clipped.

    0.5266 * 974 + 0.1489 * 753.3 + 0.0301 * 520.5 + 0.0814 * 297.8 + 0.2119 * 661.6 + 0.0011 * 38135.6 =
    847.1.
    """
    lengths = long_tailed_lengths(400_000, capacity=131072)
    assert 810 < lengths.mean() < 870
    assert lengths.max() > 60_000 and lengths.min() >= 8
    assert (lengths > 8192).mean() > 0.001
    np.testing.assert_array_equal(lengths[:100], long_tailed_lengths(400_000, capacity=131072)[:100])


def test_packing_figures() -> None:
    """Two units of 6 and two of 4 fill two packs of 10. A fifth unit of 5 opens a third pack: 25 of 30."""
    packed = time_packing(np.array([6, 4, 5, 4, 6]), capacity=10)
    assert (packed.units, packed.packs) == (5, 3)
    assert packed.fill == 25 / 30
    assert packed.seconds > 0


def test_loader_counts_every_token_once(tmp_path: Path, monkeypatch) -> None:
    """With a clock that advances one second at each call, tokens per second equal the store's tokens."""
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    tokens = time_loader(tmp_path / "store", pack_length=1024, tokens=50_000)
    count = len(long_tailed_lengths(int(50_000 / 847.1), capacity=1024))
    assert tokens == long_tailed_lengths(count, capacity=1024).sum()


def test_one_core_is_undone() -> None:
    if not hasattr(os, "sched_getaffinity"):
        return
    before = os.sched_getaffinity(0)
    with one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_figures_of_rounds() -> None:
    """Each of two rounds has its sample. The fill is the same in all rounds."""
    found = data_figures([Packed(1000, 7, s, 0.75) for s in (0.5, 0.25)], [{8192: 9.0}, {8192: 11.0}])
    assert {name: figure.samples for name, figure in found.items()} == {
        "packing 1,000 lengths": (0.5, 0.25),
        "fill of the 7 packs": (75.0,),
        "loader, packs of 8,192": (9.0, 11.0),
    }


def test_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LENGTHS", 1000)
    monkeypatch.setattr(data, "LOADED", {1024: 20_000})
    record = measure_data(rounds=2)
    assert all(len(f.samples) == 2 for name, f in record.figures.items() if "fill" not in name)
    with pytest.raises(ValueError, match="--rounds 0: want at least 1"):
        measure_data(rounds=0)
