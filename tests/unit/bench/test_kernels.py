"""The output of the kernels' benchmarks is read."""

from pathlib import Path

import pytest

from megatron_post.bench import kernels

TABLE = """NVIDIA H200, torch 2.13, 2026-11-21

logprob, t 8,192
                                        ms   TFLOP/s    roof     GiB
cuBLAS                              12.500     700.0  100.0%    0.50
megatron-post, into main_grad        1.250      70.0   10.0%    0.00
torch.compile                                            does not fit

logprob, t 16,384
                                        ms   TFLOP/s    roof     GiB
cuBLAS                              25.000     700.0  100.0%    0.50
"""


def test_tables_are_read() -> None:
    assert {name: figure.median for name, figure in kernels.read_tables(TABLE)} == {
        "logprob, t 8,192: cuBLAS": 12.5,
        "logprob, t 8,192: megatron-post, into main_grad": 1.25,
        "logprob, t 16,384: cuBLAS": 25.0,
    }


@pytest.mark.slow
def test_a_script_prints_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny shapes run on the CPU: each loss forward, and forward with backward."""
    monkeypatch.setattr(kernels, "scripts", lambda scripts=kernels.scripts: scripts()[-1:])
    record = kernels.measure_kernels(tiny=True)
    assert record.settings == {"scripts": "bench_ranking_loss.py"}
    assert len(record.figures) >= 4 and all(figure.median > 0 for figure in record.figures.values())
    assert all(name.startswith("ranking_loss") for name in record.figures)


def test_without_a_gpu_it_says_what_is_missing() -> None:
    assert "(dpo_loss, linear_logprob, logprob, ranking_loss) cannot be measured" in kernels.without_gpu()


def test_an_installed_package_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "_KERNELS", tmp_path)
    with pytest.raises(ValueError, match="holds no benchmarks; a checkout has them"):
        kernels.scripts()
