"""The CPU adapter maps CUDA calls and leaves nothing behind."""

import pytest
import torch

from megatron_post.parallel.cpu import ApexStyleAdam, cpu_as_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the adapter is never entered")


def test_maps_cuda_to_the_cpu() -> None:
    with cpu_as_cuda():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"
        assert torch.ones(2).cuda().type() == "torch.cuda.FloatTensor"
        assert torch.ones(2).to("cuda:0").device.type == "cpu"
        assert not torch.empty(2, pin_memory=True).is_pinned()


def test_undone_on_exit() -> None:
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


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_equals_torch(weight_decay: float) -> None:
    """Bitwise torch's AdamW over five steps, with the step in the group and the moments alone in the
    state."""
    start = torch.randn(7, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    a, b = ApexStyleAdam([ours], **settings), torch.optim.AdamW([theirs], **settings, fused=True)
    for step in range(5):
        for parameter, optimizer in ((ours, a), (theirs, b)):
            parameter.grad = torch.sin(start * (step + 1))
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert a.param_groups[0]["step"] == 5 and set(a.state[ours]) == {"exp_avg", "exp_avg_sq"}
