"""The CPU adapter maps CUDA calls, and undoes all changes on exit."""

import pytest
import torch

from megatron_post.parallel.cpu import cpu_as_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the adapter is never entered")


def test_maps_cuda_to_the_cpu() -> None:
    with cpu_as_cuda():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"
        assert torch.ones(2).cuda().type() == "torch.cuda.FloatTensor"
        assert torch.ones(2).to("cuda:0").device.type == "cpu"
        assert not torch.empty(2, pin_memory=True).is_pinned()


def test_everything_is_undone_on_exit() -> None:
    before = {
        name: getattr(torch.cuda, name)
        for name in ("current_device", "Stream", "manual_seed", "memory_stats")
    }
    with pytest.raises(KeyError), cpu_as_cuda():
        raise KeyError
    assert before == {name: getattr(torch.cuda, name) for name in before}
    assert torch.ones(2).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")
