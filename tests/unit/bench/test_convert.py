"""The conversion benchmark on small models: what it claims is what it measures."""

from pathlib import Path

import pytest
from rich.console import Console

from megatron_post.bench import convert


@pytest.mark.slow
def test_memory_is_flat_in_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 MB in 2 layers and 230 MB in 8: the same peak to a tenth of what was added, far below the limit."""
    shape = {"preset": "tiny", "hidden_size": 1024, "ffn_hidden_size": 3584, "vocab_size": 1024}
    for layers in (2, 8):
        monkeypatch.setitem(convert.MODELS, f"{layers}", {**shape, "num_layers": layers})
    small, large = convert.measure_conversions(tmp_path, names=("2", "8"), rounds=1)
    assert large.total_bytes - small.total_bytes > 160 * 2**20
    for peak in ("to_megatron_peak", "to_hf_peak"):
        assert abs(getattr(large, peak) - getattr(small, peak)) < 16
        assert getattr(large, peak) < 2 * large.largest_bytes / 2**20 + 1024
    assert min(small.copy, small.to_megatron, small.to_hf, small.to_hf_ratio) > 0
    assert not list(tmp_path.iterdir())
    console = Console(record=True, width=120)
    console.print(convert.conversion_table([small, large], workers=1))
    assert "limit in MiB" in console.export_text()
    figures = convert.conversion_record([small, large], workers=1).figures
    assert figures["2: to Megatron"].median == small.to_megatron and figures["8: peak"].unit == "MiB"


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = convert.shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="has less than 5,0"):
        convert.measure_conversions(tmp_path, names=("8B, 2 layers",))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--model \['9B'\] --rounds 3: choose of '8B, 2 layers'"):
        convert.measure_conversions(tmp_path, names=("9B",))
