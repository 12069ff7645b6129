"""The interpreter has a process of its own, and the tests' process still compiles."""

import os

import pytest

from tests.kernels.interpreter import kernel_device, on_kernels

triton = pytest.importorskip("triton")


@on_kernels
def test_kernels_run_interpreted_here() -> None:
    if kernel_device() == "cpu":
        assert os.environ["TRITON_INTERPRET"] == "1"
        assert type(triton.jit(kernel_device)).__name__ == "InterpretedFunction"
        assert type(triton.language.max).__name__ == "InterpretedFunction"


@on_kernels
def fails(number: int) -> None:
    raise AssertionError(f"number {number}")


def test_a_failure_arrives() -> None:
    with pytest.raises(AssertionError, match="number 2"):
        fails(number=2)


def test_this_process_is_left_alone() -> None:
    assert "TRITON_INTERPRET" not in os.environ
    assert type(triton.language.max).__name__ == "JITFunction"
