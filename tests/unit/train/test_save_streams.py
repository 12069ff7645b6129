"""A checkpoint written beside training holds the values of its step, however the GPU orders its work."""

from pathlib import Path

import pytest
import torch

from megatron_post.train.async_save import Save, Saver
from megatron_post.train.shards import Shard
from tests.fake_streams import FakeDevice, FakeStream, fake_streams

SEEDS = range(12)


def _is_right(device: FakeDevice, directory: Path) -> bool:
    """Whether three saves by one saver, which uses its buffers again, each hold the values of their step.

    Step n computes n on the compute stream, and later steps overwrite it as soon as that is allowed.
    """
    values = torch.zeros(64)
    saver = Saver(0, 1, torch.device("cuda", 0))
    saved = []
    for step in (1, 2, 3):
        device.current.launch(lambda step=step: values.fill_(step))
        save = Save(directory / str(step), [Shard("w", (64,), (0,), values)], {}, {}, lambda files: None)
        saver.start(save, asynchronous=True)
        saver.may_change()
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
def test_a_forgotten_wait_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    """A copy that does not wait for the computation, or is not waited for: the test above must see either."""
    monkeypatch.setattr(FakeStream, forgotten, lambda self, *_: None)
    found = []
    for seed in SEEDS:
        with fake_streams(seed) as device:
            found.append(_is_right(device, tmp_path / str(seed)))
    assert not all(found)
