"""The conversion benchmark on small models."""

from pathlib import Path

import pytest
from rich.console import Console

from megatron_post.bench import convert


@pytest.mark.slow
def test_memory_is_flat_in_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 MB in 2 layers and 230 MB in 8 have the same peak, to a tenth of the added bytes."""
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
    figures = convert.conversion_record([small, large], workers=1).figures
    assert figures["2: to Megatron"].median == small.to_megatron and figures["8: peak"].unit == "MiB"


def test_the_table_fits_a_terminal() -> None:
    """The largest model at the largest expected speeds fits in 80 columns."""
    figures = convert.ConversionFigures(
        name="405B, 1 layer",
        total_bytes=6_410_000_000,
        largest_bytes=1_744_830_464,
        copy=2592.0,
        durable_copy=1289.0,
        to_megatron=1084.0,
        to_hf=1694.0,
        to_megatron_ratio=0.84,
        to_hf_ratio=1.31,
        to_megatron_peak=303.0,
        to_hf_peak=1302.0,
        rounds=(),
    )
    console = Console(record=True, width=80)
    console.print(convert.conversion_table([figures], workers=1))
    text = console.export_text()
    row = "405B, 1 layer 6.41 2,592 1,289 1,084 (84%) 1,694 (131%) 1,302 4,352"
    assert row in " ".join(text.split()) and "\u2026" not in text, text


def test_too_little_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = convert.shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="has less than 5,0"):
        convert.measure_conversions(tmp_path, names=("8B, 2 layers",))


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--model \['9B'\] --rounds 3: choose from '8B, 2 layers'"):
        convert.measure_conversions(tmp_path, names=("9B",))
