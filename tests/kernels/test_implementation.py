"""The selection of an implementation, and the package on a machine without Triton."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron_post_kernels.implementation import resolve

from tests.kernels.interpreter import kernel_device, on_kernels

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def test_cpu() -> None:
    tensor = torch.zeros(1)
    assert resolve("auto", tensor) == resolve("torch", tensor) == "torch"
    with pytest.raises(ValueError, match="on cpu"):
        resolve("triton", tensor)


@on_kernels
def test_kernels_when_asked_or_on_a_gpu() -> None:
    tensor = torch.zeros(1, device=kernel_device())
    assert resolve("triton", tensor) == "triton"
    assert resolve("auto", tensor) == ("triton" if tensor.is_cuda else "torch")
    assert resolve("auto", tensor.double()) == "torch"
    with pytest.raises(ValueError, match="float64"):
        resolve("triton", tensor.double())


def test_unknown() -> None:
    with pytest.raises(ValueError, match="cuda"):
        resolve("cuda", torch.zeros(1))  # type: ignore[arg-type]


# None in sys.modules is how Python remembers a module that cannot be imported
_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from megatron_post_kernels.implementation import resolve
from megatron_post_kernels.linear_logprob import linear_logprob
states = torch.ones(2, 3, requires_grad=True)
linear_logprob(states, torch.ones(4, 3), torch.tensor([0, 3])).sum().backward()
assert states.grad.eq(0).all()
try:
    resolve("triton", states)
except ValueError as error:
    assert "not installed" in str(error)
print(sorted({name.split(".")[0] for name in sys.modules} & {"megatron", "megatron_post"}))
"""


def test_without_triton() -> None:
    """The torch implementation runs, and nothing of Megatron is imported."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TRITON],
        env={"PYTHONPATH": str(KERNELS)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
