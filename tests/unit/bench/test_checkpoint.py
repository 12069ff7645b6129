"""The cost of saves: figures computed by hand, and a real run of both kinds."""

from pathlib import Path
from typing import Any

import pytest

from megatron_post.bench.checkpoint import Interval, default_config, figures, measure_checkpoints
from megatron_post.plan.shape import model_parameters
from tests.ranks import run_ranks
from tests.tiny import tiny_config


def test_figures_by_hand() -> None:
    """Of two ranks, the one that the save held up longer counts: 4 s and 0.2 s, which is a twentieth."""
    ranks = [
        [Interval("synchronous", 3.0, 5.0, (1.0, 1.1)), Interval("asynchronous", 0.2, 2.0, (1.2, 1.0))],
        [Interval("synchronous", 4.0, 4.0, (1.2, 1.0)), Interval("asynchronous", 0.1, 3.0, (1.0, 1.0))],
    ]
    found = {name: figure.samples for name, figure in figures(ranks, size=2 * 10**9).items()}
    assert found == {
        "held up by a save, synchronous": (4.0,),
        "held up by a save, asynchronous": (0.2,),
        "asynchronous / synchronous": (5.0,),
        "step behind a save, synchronous": (5.0,),
        "step behind a save, asynchronous": (3.0,),
        "other steps": (1.2, 1.1, 1.2, 1.0),
        "checkpoint": (2.0,),
    }


def test_the_default_model() -> None:
    """The sizes of its 12 layers, two embeddings and last norm add up to 56 million parameters.

    A layer has matrices of 640 x (1,280 + 640 + 3 x 1,760) and two norms. The embeddings have 512 ids.
    """
    layer = 640 * (1280 + 640 + 3 * 1760) + 2 * 640
    assert model_parameters(default_config()) == 12 * layer + 2 * 512 * 640 + 640


def _measure(directory: str) -> Any:
    config = tiny_config(Path(directory) / "run", data={"store": f"{directory}/store"})
    return measure_checkpoints(
        config, subject="tiny", directory=f"{directory}/disk", saves=2, every=2, rounds=1
    )


def test_both_kinds_of_two_ranks(tmp_path: Path) -> None:
    """Two ranks make two saves of each kind.

    A checkpoint has at least 16 bytes for each parameter: fp32 weights, master weights and two moments.
    """
    found = run_ranks(_measure, 2, str(tmp_path))
    (record,) = [value for value in found if value is not None]
    assert len(record.figures["held up by a save, synchronous"].samples) == 2
    assert len(record.figures["other steps"].samples) == 4
    assert record.figures["held up by a save, synchronous"].median > 0
    assert record.figures["checkpoint"].median * 1e9 > 16 * model_parameters(tiny_config())
    assert not list((tmp_path / "disk").iterdir()) and not (tmp_path / "run").exists()


def test_counts_without_a_measurement_are_refused() -> None:
    with pytest.raises(ValueError, match="--saves 0 --every 3 --rounds 2: want at least 1 of each"):
        measure_checkpoints(tiny_config(), subject="tiny", directory="unused", saves=0, every=3, rounds=2)
