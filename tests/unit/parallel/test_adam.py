"""The Adam that megatron-core gets where there is no fused one: torch's arithmetic, Apex's interface."""

from unittest import mock

import megatron.core.optimizer as core_optimizer
import megatron.core.optimizer.distrib_optimizer as core_distributed
import pytest
import torch

from megatron_post.parallel import adam
from megatron_post.parallel.adam import ApexStyleAdam, resumable_adam


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


def test_the_counter_of_steps_is_on_the_device_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter on the CPU would make torch copy it, and wait for the GPU, for each parameter."""
    counters: list[list[torch.Tensor]] = []
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *lists, **_: counters.append(lists[-1]))
    parameters = [torch.nn.Parameter(torch.empty(3, device="meta")) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.empty(3, device="meta")
    ApexStyleAdam(parameters).step()
    ((first, second),) = counters
    assert first is second and first.device.type == "meta" and first.dtype == torch.float32


@pytest.mark.parametrize(
    ("engine", "apex", "extensions", "has_gpu", "taken"),
    [
        (False, False, False, True, True),
        (False, True, False, True, True),  # Apex built without its CUDA extensions: its Adam raises
        (False, True, True, True, False),
        (True, False, False, True, False),
        (True, False, False, False, True),
    ],
)
def test_where_it_is_taken(engine: bool, apex: bool, extensions: bool, has_gpu: bool, taken: bool) -> None:
    fused = type("FusedAdam", (), {})
    found = {"USING_TE_OPTIMIZER": engine, "USING_APEX_OPTIMIZER": apex, "Adam": fused}
    find_spec = mock.Mock(return_value=object() if extensions else None)
    with (
        mock.patch.multiple(core_distributed, **found),
        mock.patch.object(core_optimizer, "Adam", fused),
        mock.patch.object(adam.importlib.util, "find_spec", find_spec),
    ):
        with resumable_adam(has_gpu=has_gpu):
            expected = ApexStyleAdam if taken else fused
            assert core_optimizer.Adam is core_distributed.Adam is expected
        assert core_optimizer.Adam is core_distributed.Adam is fused
