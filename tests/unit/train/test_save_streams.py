"""A checkpoint that is written during training holds the values of its step, in any order of GPU work."""

from pathlib import Path

import pytest
import torch

from megatron_post.train.async_save import Save, Saver
from megatron_post.train.shards import Shard
from tests.fake_streams import FakeDevice, FakeStream, fake_streams

SEEDS = range(12)


def _is_right(device: FakeDevice, directory: Path) -> bool:
    """Whether each of three saves holds the values of its step. The saver reuses its buffers.

    Step n writes n on the compute stream, and the values are overwritten as soon as `wait_for_copy` returns.
    """
    values = torch.zeros(64)
    saver = Saver(0, 1, torch.device("cuda", 0))
    saved = []
    for step in (1, 2, 3):
        device.current.launch(lambda step=step: values.fill_(step))
        save = Save(directory / str(step), [Shard("w", (64,), (0,), values)], {}, {}, lambda files: None)
        saver.start(save, asynchronous=True)
        saver.wait_for_copy()
        device.current.launch(lambda: values.fill_(-1))
        saver.wait()
        assert saver.error is None
        saved.append(torch.load(save.partial / "__0_0.distcp", weights_only=True))
    device.synchronize()
    return all(bool((found == step).all()) for step, found in enumerate(saved, start=1))


@pytest.mark.parametrize("seed", SEEDS)
def test_saved_values_are_right_in_any_order_of_work(tmp_path: Path, seed: int) -> None:
    with fake_streams(seed) as device:
        assert _is_right(device, tmp_path)


@pytest.mark.parametrize("forgotten", ["wait_event", "synchronize"])
def test_the_test_above_detects_a_missing_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """Either the copy does not wait for the computation, or the saver does not wait for the copy."""
    monkeypatch.setattr(FakeStream, forgotten, lambda self, *_: None)
    found = []
    for seed in SEEDS:
        with fake_streams(seed) as device:
            found.append(_is_right(device, tmp_path / str(seed)))
    assert not all(found)
