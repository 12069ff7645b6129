"""The Adam for runs without a fused one has torch's arithmetic and Apex's interface."""

from unittest import mock

import megatron.core.optimizer as core_optimizer
import megatron.core.optimizer.clip_grads as core_clip
import megatron.core.optimizer.distrib_optimizer as core_distributed
import pytest
import torch

from megatron_post.parallel import adam
from megatron_post.parallel.adam import ApexStyleAdam, torch_optimizer


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_equals_torch(weight_decay: float) -> None:
    """Five steps equal torch's AdamW bit for bit. The group has the step, and the state only the moments."""
    start = torch.randn(7, generator=torch.Generator().manual_seed(0))
    parameter, expected = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    adam = ApexStyleAdam([parameter], **settings)
    torch_adam = torch.optim.AdamW([expected], **settings, fused=True)
    for step in range(5):
        for value, optimizer in ((parameter, adam), (expected, torch_adam)):
            value.grad = torch.sin(start * (step + 1))
            optimizer.step()
    assert torch.equal(parameter, expected)
    assert adam.param_groups[0]["step"] == 5 and set(adam.state[parameter]) == {"exp_avg", "exp_avg_sq"}


def test_the_step_counter_is_on_the_device_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were on the CPU, torch would copy it and wait for the GPU for each parameter."""
    counters: list[list[torch.Tensor]] = []
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *lists, **_: counters.append(lists[-1]))
    parameters = [torch.nn.Parameter(torch.empty(3, device="meta")) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.empty(3, device="meta")
    ApexStyleAdam(parameters).step()
    ((first, second),) = counters
    assert first is second and first.device.type == "meta" and first.dtype == torch.float32


def test_the_norm_of_all_gradients() -> None:
    """The root of 3^2 + 4^2 + 12^2 is 13. The norm stays on the device of the gradients."""
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])]
    norm, _ = adam.gradient_norm(65536, torch.zeros(1), [gradients], False)
    assert norm.tolist() == [13.0] and norm.dtype == torch.float32
    elsewhere, _ = adam.gradient_norm(65536, torch.zeros(1), [[g.to("meta") for g in gradients]], False)
    assert elsewhere.device.type == "meta"


@pytest.mark.parametrize(
    ("engine", "apex", "extensions", "has_gpu", "is_used"),
    [
        (False, False, False, True, True),
        (False, True, False, True, True),  # Apex built without its CUDA extensions: its Adam raises
        (False, True, True, True, False),
        (True, False, False, True, False),
        (True, False, False, False, True),
    ],
)
def test_when_it_is_used(engine: bool, apex: bool, extensions: bool, has_gpu: bool, is_used: bool) -> None:
    fused = type("FusedAdam", (), {})
    found = {"USING_TE_OPTIMIZER": engine, "USING_APEX_OPTIMIZER": apex, "Adam": fused}
    find_spec = mock.Mock(return_value=object() if extensions else None)
    with (
        mock.patch.multiple(core_distributed, **found),
        mock.patch.object(core_optimizer, "Adam", fused),
        mock.patch.object(adam.importlib.util, "find_spec", find_spec),
    ):
        with torch_optimizer(has_gpu=has_gpu):
            expected = ApexStyleAdam if is_used else fused
            assert core_optimizer.Adam is core_distributed.Adam is expected
            assert (core_clip.l2_norm_impl is adam.gradient_norm) == is_used
        assert core_optimizer.Adam is core_distributed.Adam is fused
