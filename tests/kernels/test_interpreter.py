"""The interpreter runs in its own process, and the tests' process can still compile."""

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


def test_a_failure_in_the_interpreter_is_reported() -> None:
    with pytest.raises(AssertionError, match="number 2"):
        fails(number=2)


def test_this_process_does_not_interpret() -> None:
    assert "TRITON_INTERPRET" not in os.environ
    assert type(triton.language.max).__name__ == "JITFunction"
