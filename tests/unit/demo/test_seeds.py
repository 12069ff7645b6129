"""The comparison of several seeds."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_post.demo.seeds import Spread, compare


def test_interval_of_three_seeds() -> None:
    """The mean is 0.6 and the standard deviation 0.1.

    Half the interval is 0.1 / sqrt(3) * 4.303 = 0.24844.
    """
    assert Spread((0.5, 0.6, 0.7)).interval == pytest.approx((0.35157, 0.84843), abs=1e-5)
    assert str(Spread((0.5, 0.6, 0.7))) == "60.0  (35.2 to 84.8; 50.0, 60.0, 70.0)"


def _results(sft: int, one_sample: int, best_of_k: int, greedy: int) -> dict[str, Any]:
    counts = {"greedy": greedy, "one_sample": one_sample, "best_of_k": best_of_k}
    accuracies = {name: {"correct": count, "total": 100} for name, count in counts.items()}
    return {
        "before": {"correct": 0, "total": 100},
        "sft": {"correct": sft, "total": 100},
        "rounds": [accuracies],
    }


def test_gains_are_paired_by_seed(tmp_path: Path) -> None:
    """The round gains 40 and 20 points and best of K 10 and 20, at whatever level the seeds are."""
    console = Console(file=io.StringIO(), width=160)
    compare([_results(10, 30, 40, 50), _results(50, 30, 50, 70)], tmp_path, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    page = (tmp_path / "seeds.html").read_text()
    # 12.706 * stdev / sqrt(2), with standard deviations of 14.142 and 7.071 points, gives 127.06 and 63.53.
    for text in ("30.0  (-97.1 to 157.1; 40.0, 20.0)", "15.0  (-48.5 to 78.5; 10.0, 20.0)"):
        assert text in printed and text in page
    assert page.startswith("<!doctype html>") and "<svg" in page
