"""The compile harness reads a kernel's resources correctly.

Otherwise a test of "no spills" could not fail.
"""

import pytest

triton = pytest.importorskip("triton")

from triton import language as tl  # noqa: E402

from tests.kernels.compiling import compiled_resources  # noqa: E402


@triton.jit
def scale_rows(pointer, stride, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0) * stride + tl.arange(0, SIZE)
    row = tl.load(pointer + offsets)
    tl.store(pointer + offsets, row / tl.sum(row))


def test_a_small_kernel_fits() -> None:
    """512 fp32 over 4 warps are 4 per thread. The sum over warps uses one fp32 of shared memory per warp."""
    used = compiled_resources(
        scale_rows, {"pointer": "*fp32:16", "stride": "i32:16"}, {"SIZE": 512}, num_warps=4, capability=90
    )
    assert used.registers <= 40
    assert 16 <= used.shared_bytes <= 2048
    assert used.stack_bytes == used.local_bytes == 0


def test_a_spill_is_detected() -> None:
    """16,384 fp32 on one warp are 512 per thread, but a thread has only 255 registers."""
    used = compiled_resources(
        scale_rows, {"pointer": "*fp32:16", "stride": "i32:16"}, {"SIZE": 16384}, num_warps=1, capability=90
    )
    assert used.stack_bytes >= 4 * (512 - 255)


def test_arguments_must_match() -> None:
    with pytest.raises(AssertionError, match="stride"):
        compiled_resources(scale_rows, {"pointer": "*fp32"}, {"SIZE": 512}, num_warps=4, capability=90)
