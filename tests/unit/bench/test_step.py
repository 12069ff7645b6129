"""Real steps in small layouts, and figures of given steps computed by hand."""

from pathlib import Path
from typing import Any

import pytest

from megatron_post.bench.accounting import Counts
from megatron_post.bench.step import Measured, Rank, TimedStep, measure_steps
from megatron_post.bench.step_figures import step_figures, step_notes, step_record
from megatron_post.plan.flops import Load, step_flops
from megatron_post.plan.hardware import gpu_of_device
from tests.e2e.runs import small_run
from tests.ranks import run_ranks
from tests.tiny import tiny_config


def _measured(path: str, sections: dict[str, Any], steps: int) -> Any:
    config = tiny_config(path, data={"store": f"{path}/store", "pack_length": 128}, **sections)
    return measure_steps(config, steps=steps, warmup=1)


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"tensor": 2, "sequence": True}},
        {"stage": "dpo"},
        {"stage": "reward", "parallel": {"context": 2}},
    ],
    ids=["SFT, TP 2", "DPO, DP 2", "reward, CP 2"],
)
def test_steps_of_two_ranks(sections: dict[str, Any], tmp_path: Path) -> None:
    """One rank reports for both, and nothing is left in run_dir.

    A step has four packs of 128, on whatever ranks they are. The sections add up to the step, except for the
    time between them.
    """
    found = run_ranks(_measured, 2, str(tmp_path / "run"), sections, 2)
    (measured,) = [value for value in found if value is not None]
    assert [rank.rank for rank in measured.ranks] == [0, 1]
    assert all(len(rank.steps) == 2 for rank in measured.ranks)
    for rank in measured.ranks:
        for step in rank.steps:
            assert list(step.phases) == [
                "data",
                "forward and backward",
                "reduce gradients",
                "update",
                "report",
            ]
            assert 0.5 * step.seconds < sum(step.phases.values()) <= step.seconds
    counting = [rank for rank in measured.ranks if rank.counts_packs]
    assert len(counting) == (1 if "parallel" in sections else 2)
    assert sum(rank.steps[0].counts.capacity for rank in counting) == 4 * 128
    assert "synthetic" in measured.notes[0]
    assert not (tmp_path / "run").exists()


def test_a_step_on_the_config_s_own_store(tmp_path: Path) -> None:
    """The step reads the store's tokens, and writes neither checkpoints nor metrics to run_dir.

    The config's weights do not exist, and a note says so.
    """
    config = small_run(tmp_path, model={"init_from": str(tmp_path / "missing")})
    (measured,) = run_ranks(measure_steps_of, 1, config)
    assert measured.data.endswith("packs of sums")
    assert measured.notes == (f"random weights: {tmp_path / 'missing'} does not exist",)
    assert not Path(config.run_dir).exists()
    record = step_record(measured, warmup=0, origin="a.yaml")
    assert record.subject == "sft, a.yaml" and record.settings["layout"].startswith("one rank")
    assert record.environment["GPU"] == "none" and record.environment["torch"]


def measure_steps_of(config: Any) -> Any:
    return measure_steps(config, steps=1, warmup=0)


def _step(seconds: float, data: float, passes: float, counts: Counts) -> TimedStep:
    return TimedStep(seconds, {"data": data, "forward and backward": passes}, counts)


def test_figures_by_hand() -> None:
    """Two data-parallel ranks have 100 and 60 real tokens of 128 each.

    The slower rank takes 2 s, so the step has 160 / 2 / 2 = 40 tokens/s/rank and is 62.5% full. The own work
    is 1.5 and 0.5 s, so the slower rank's is 1.5 times the mean.
    """
    config = tiny_config()
    first = Counts(128, 100, 30, 4, Load(100, 5000, 30), Load(128, 6000, 30))
    second = Counts(128, 60, 10, 1, Load(60, 3600, 10), Load(128, 9000, 10))
    ranks = (
        Rank(0, True, (_step(2.0, 0.5, 1.0, first),), 2**30),
        Rank(1, True, (_step(1.9, 0.1, 0.4, second),), 2**31),
    )
    measured = Measured(config, "8 packs", (), ranks, 2)
    found = {name: figure.samples[0] for name, figure in step_figures(measured).items()}
    assert found["step"] == 2.0
    assert (found["tokens/s/rank"], found["trained tokens/s/rank"], found["padded tokens/s/rank"]) == (
        40,
        10,
        64,
    )
    assert found["examples/s"] == 2.5 and found["packing efficiency"] == 62.5
    assert found["phase: data"] == 0.3 and found["own work, slowest / mean"] == 1.5
    assert found["memory, fullest rank"] == 2.0 and "MFU" not in found
    model = step_flops(config, Load(160, 8600, 40)).model / 2 / 2 / 1e12
    executed = step_flops(config, Load(256, 15000, 40)).executed / 2 / 2 / 1e12
    assert found["model TFLOP/s/rank"] == model and found["executed TFLOP/s/rank"] == executed > model
    assert "slowest by its own work: rank 0; fullest: rank 1" in step_notes(measured)


def test_peaks_by_the_name_of_a_device() -> None:
    h100 = gpu_of_device("NVIDIA H100 80GB HBM3")
    assert h100 is not None and h100.name == "h100-80gb" and gpu_of_device("NVIDIA A10G") is None
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA GB200"):
        assert gpu_of_device(other) is None, other


@pytest.mark.parametrize(("steps", "warmup"), [(0, 3), (1, -1)])
def test_counts_without_a_measurement_are_refused(steps: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=f"--steps {steps} --warmup {warmup}: want at least 1 step"):
        measure_steps(tiny_config(), steps=steps, warmup=warmup)
