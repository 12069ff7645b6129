"""The benchmarks of kernels run on the CPU with tiny shapes, report a missing GPU, and compute rates."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def _run(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(KERNELS / "benchmarks" / f"{name}.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(KERNELS), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (
            "bench_logprob",
            ["copy", "megatron-post, forward", "megatron-post", "torch eager, forward", "torch eager"],
        ),
        (
            "bench_linear_logprob",
            [
                "cuBLAS",
                "megatron-post",
                "megatron-post, one chunk",
                "megatron-post, chunks of 2,048",
                "megatron-post, into main_grad",
                "torch eager",
            ],
        ),
        (
            "bench_dpo_loss",
            ["copy", "megatron-post, forward", "megatron-post", "torch eager, forward", "torch eager"],
        ),
        (
            "bench_ranking_loss",
            ["copy", "megatron-post, forward", "megatron-post", "torch eager, forward", "torch eager"],
        ),
    ],
)
def test_a_benchmark_runs_with_tiny_shapes(name: str, rows: list[str]) -> None:
    done = _run(name, "--tiny", "--rounds", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stdout.splitlines()
    assert "times mean nothing" in printed[0]
    found = [line[:32].strip() for line in printed[4:]]
    assert found[: len(rows)] == rows
    roof = printed[4].split()
    assert roof[-2:] == ["100.0%", "0.00"] and float(roof[1]) > 0


def test_a_missing_gpu_is_reported() -> None:
    done = _run("bench_logprob")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no GPU here" in done.stderr


def test_linear_cross_entropy_without_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """This implementation is left out if torch has the function but not its options."""
    monkeypatch.syspath_prepend(str(KERNELS / "benchmarks"))
    bench = importlib.import_module("bench_linear_logprob")
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", lambda: None, raising=False)
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    assert "F.linear_cross_entropy" not in bench.losses(True, torch.zeros(1))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["gpu-test", "gpu-bench"])
def test_gpu_targets_install_nothing(target: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target, f"VENV={tmp_path}", "PYTHON=its-own-python"],
        cwd=KERNELS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "pip" not in done.stdout and "kernels its-own-python " in done.stdout


def test_rates_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """2e9 bytes in 1 ms are 2,000 GB/s. 3e9 bytes in 2 ms are 1,500 GB/s, which is 75% of it."""
    monkeypatch.syspath_prepend(str(KERNELS / "benchmarks"))
    timing = importlib.import_module("timing")
    timing.print_table(
        "title",
        {
            "copy": timing.Timing(1e-3, 0),
            "megatron-post": timing.Timing(2e-3, 2**29),
            "other": "does not fit",
        },
        work={"copy": 2e9, "megatron-post": 3e9},
        unit="GB/s",
        roof="copy",
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[3] == ["copy", "1.000", "2000.0", "100.0%", "0.00"]
    assert lines[4] == ["megatron-post", "2.000", "1500.0", "75.0%", "0.50"]
    assert lines[5] == ["other", "does", "not", "fit"]
