"""One process runs as a rank of a layout, and builds and computes that rank's share."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_post.bench import proxy
from megatron_post.bench.accounting import Counts
from megatron_post.bench.proxy import PROXY_WARNING, measure_proxy, with_layers
from megatron_post.bench.proxy_figures import Passes, Share, proxy_figures
from megatron_post.config.load import ConfigError
from megatron_post.config.schema import Config
from megatron_post.plan.flops import Load
from megatron_post.plan.shape import chunks
from tests.tiny import tiny_config

LAYOUT = {"tensor": 2, "sequence": True, "pipeline": 2, "context": 2}


def _measure(config: Config, rank: int, world_size: int, layers: int | None = None) -> Any:
    return measure_proxy(
        config, origin="a.yaml", rank=rank, world_size=world_size, layers=layers, steps=1, warmup=0
    )


@pytest.mark.parametrize(
    ("sections", "rank", "layers"),
    [
        ({"parallel": LAYOUT}, 0, None),
        ({"parallel": LAYOUT, "stage": "dpo"}, 15, None),
        ({"parallel": LAYOUT, "recompute": {"mode": "full"}}, 15, 1),
        ({"parallel": {**LAYOUT, "virtual_pipeline": 2}, "stage": "reward"}, 9, None),
    ],
    ids=["embedding", "head, DPO", "one layer, recomputed", "two chunks, reward"],
)
def test_a_rank_s_share(
    sections: dict[str, Any], rank: int, layers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters equal the planner's, and torch's count of operations equals `chunk_flops`.

    There are 16 ranks (DP 2). torch cannot see into the attention, so its operations are added: the forward
    pass, 2.5 times that for the backward pass, and a second forward pass if it is recomputed.
    """
    found: list[Any] = []
    figures = proxy.proxy_figures
    monkeypatch.setattr(proxy, "proxy_figures", lambda *a, **k: found.extend(a) or figures(*a, **k))
    with FlopCounterMode(display=False) as counter:
        record = _measure(tiny_config(**sections), rank, 16, layers)
    share, (passes,) = found
    assert record.figures["parameters"] == record.figures["parameters by the planner"]
    assert "share" in record.settings and ("cut" in record.settings) == (layers is not None)
    assert record.notes[0] == PROXY_WARNING
    assert len(share.chunks) == share.config.parallel.virtual_pipeline
    flops = share.flops(passes.counts.computed)
    unseen = flops.attention / 3 * (3.5 + (layers is not None))
    assert counter.get_total_flops() == flops.executed - unseen


def test_all_gradients_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros or garbage would be another computation to a GPU, whose power depends on the values.

    The rank is the last of the context-parallel ranks, which counts no pairs. Its part of the vocabulary
    misses most labels.
    """
    wrap, kept = proxy.wrap_data_parallel, []
    monkeypatch.setattr(proxy, "wrap_data_parallel", lambda *a: kept.extend(wrap(*a)) or kept)
    _measure(tiny_config(stage="dpo", parallel=LAYOUT), 15, 16)
    (chunk,) = kept
    gradients = torch.cat([buffer.grad_data for buffer in chunk.buffers])
    assert bool(gradients.isfinite().all()) and float((gradients == 0).float().mean()) < 0.1


def test_layers_of_a_cut_model() -> None:
    """Three layers on each of two pipeline ranks are one chunk."""
    config = with_layers(tiny_config(parallel={**LAYOUT, "virtual_pipeline": 2}), 3)
    assert [[chunk.layers for chunk in rank] for rank in chunks(config)] == [[3], [3]]


def test_figures_by_hand() -> None:
    """A pack takes 1 s forward and 3 s backward."""
    config = tiny_config()
    share = Share(config, 0, 1, 0, 1, tuple(chunks(config)[0]), 7)
    counts = Counts(128, 64, 10, 2, Load(64, 4096, 10), Load(128, 8192, 10))
    found = {n: f.median for n, f in proxy_figures(share, [Passes(1.0, 3.0, counts)], memory=2**30).items()}
    assert (
        found["pack, compute only"] == 4.0 and found["packing efficiency"] == 50.0 and found["memory"] == 1.0
    )
    assert found["model TFLOP/s"] == share.flops(counts.useful).model / 4e12
    assert found["executed TFLOP/s"] == share.flops(counts.computed).executed / 4e12
    assert found["parameters"] == 7


def test_refusals() -> None:
    with pytest.raises(ValueError, match="--proxy-rank 8 is not a rank of --world 8: want 0 to 7"):
        _measure(tiny_config(parallel=LAYOUT), 8, 8)
    with pytest.raises(ValueError, match="--proxy-layers 0"):
        _measure(tiny_config(parallel=LAYOUT), 0, 8, 0)
    with pytest.raises(ConfigError, match="12 ranks are not a multiple of tensor x pipeline x context = 8"):
        _measure(tiny_config(parallel=LAYOUT), 0, 12)
