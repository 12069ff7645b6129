"""The Adam for runs without a fused one has torch's arithmetic and Apex's interface.

With moments in bf16 it is the Adam of every run.
"""

import math
from unittest import mock

import megatron.core.optimizer as core_optimizer
import megatron.core.optimizer.clip_grads as core_clip
import megatron.core.optimizer.distrib_optimizer as core_distributed
import pytest
import torch

from megatron_post.config.consistency import LARGEST_BF16_DECAY
from megatron_post.parallel import adam
from megatron_post.parallel.adam import ApexStyleAdam, Bf16MomentsAdam, moments_in_bf16, torch_optimizer


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


def _to_bf16(value: float) -> float:
    """Round a number in float64. It may not be so close to a tie that the error of fp32 would decide."""
    kept, exponent = math.frexp(value)
    scaled = kept * 2**8  # bf16 has 8 significant bits
    assert abs(scaled - math.floor(scaled) - 0.5) > 2**-13, "choose other numbers"
    return math.ldexp(round(scaled), exponent - 8)


@pytest.mark.parametrize("piece", [adam.PIECE, 3])
def test_moments_in_bf16_equal_a_loop_in_float64(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Five steps of AdamW, whose update has exact moments that are rounded afterwards.

    fp32 has an error of 2^-24 in each of about ten operations of an update. The update is at most 0.05, so
    five steps differ by less than 1e-6.
    """
    monkeypatch.setattr(adam, "PIECE", piece)
    start = torch.randn(7, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(start.clone())
    found = Bf16MomentsAdam([parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        parameter.grad = torch.sin(start * step)
        found.step()
    state = found.state[parameter]
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    for place, value in enumerate(start.tolist()):
        mean = square = 0.0
        for step in range(1, 6):
            gradient = float(torch.sin(start * step)[place])
            mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
            root = math.sqrt(square / (1 - 0.95**step)) + 1e-8
            value -= 1e-2 * (mean / (1 - 0.9**step) / root + 0.1 * value)
            mean, square = _to_bf16(mean), _to_bf16(square)
        assert (float(state["exp_avg"][place]), float(state["exp_avg_sq"][place])) == (mean, square)
        assert float(parameter[place]) == pytest.approx(value, abs=1e-6)


def test_a_loaded_state_is_bf16_again() -> None:
    """torch converts a state to the dtype of its parameters. The next step equals that of the first Adam."""
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizers = [Bf16MomentsAdam([first]), Bf16MomentsAdam([second])]
    first.grad = torch.tensor([0.1, 0.2, 0.3])
    optimizers[0].step()
    with torch.no_grad():
        second.copy_(first)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    second.grad = first.grad
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(first, second)
    for name, value in optimizers[0].state[first].items():
        loaded = optimizers[1].state[second][name]
        assert loaded.dtype == torch.bfloat16 and torch.equal(loaded, value)


def test_every_moment_falls_with_the_largest_decay() -> None:
    """All positive numbers of bf16 but the subnormal ones and their neighbours. With 0.997 some stay."""
    numbers = torch.arange(2 * 2**7, 255 * 2**7, dtype=torch.int16).view(torch.bfloat16)
    assert bool((numbers > 0).all()) and bool(torch.isfinite(numbers).all())
    assert bool(((numbers.float() * LARGEST_BF16_DECAY).bfloat16() < numbers).all())
    assert bool(((numbers.float() * 0.997).bfloat16() == numbers).any())


def test_megatron_core_makes_the_adam_with_bf16_moments() -> None:
    """It replaces a fused Adam too, and only within the context."""
    fused = type("FusedAdam", (), {})
    with (
        mock.patch.object(core_optimizer, "Adam", fused),
        mock.patch.object(core_distributed, "Adam", fused),
    ):
        with moments_in_bf16():
            assert core_optimizer.Adam is core_distributed.Adam is Bf16MomentsAdam
        assert core_optimizer.Adam is core_distributed.Adam is fused


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
