"""Kernels of the log-probabilities compile for Hopper and Blackwell at Llama 3's shapes, and can stream.

A multiprocessor of either has 65,536 registers and 228 KiB of shared memory. Hopper's (H200) needs some 29 KB
of loads in flight to draw 4.8 TB/s at 800 ns over 132 of them, Blackwell's (B200) 43 KB for 8 TB/s over 148.
"""

import pytest

pytest.importorskip("triton")

from megatron_post_kernels.logprob_kernels import gradient_kernel, statistics_kernel
from megatron_post_kernels.vocabulary_softmax import GRADIENT_LAUNCH, statistics_launch

from tests.kernels.compiling import CAPABILITIES, compiled_resources

BYTES_IN_FLIGHT = {90: 29_000, 100: 43_300}
# Columns of 8B on one rank, and of 405B or 8B on 8 tensor-parallel ranks. The kernels do not depend on h.
COLUMNS = pytest.mark.parametrize("columns", [128_256, 128_256 // 8])
DTYPES = pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp32", 4)])
ENTROPY = pytest.mark.parametrize("with_entropy", [False, True])


def _launch(settings: dict[str, int]) -> tuple[dict[str, int], int]:
    constexprs = {name: value for name, value in settings.items() if name != "num_warps"}
    return constexprs, settings["num_warps"]


@CAPABILITIES
@COLUMNS
@DTYPES
@ENTROPY
def test_statistics(columns: int, dtype: str, size: int, with_entropy: bool, capability: int) -> None:
    constexprs, num_warps = _launch(statistics_launch(size))
    used = compiled_resources(
        statistics_kernel,
        {
            "logits": f"*{dtype}:16",
            "labels": "*i64:16",
            "statistics": "*fp32:16",
            "row_stride": "i32:16",
            "statistics_stride": "i32:16",
            "first_row": "i32:16",
            "ignore_index": "i32",
        },
        {"COLUMNS": columns, "WITH_ENTROPY": with_entropy, **constexprs},
        num_warps=num_warps,
        capability=capability,
    )
    # For bf16 and 16,032 columns on Blackwell the compiler uses only 80 registers, and spills two.
    assert used.stack_bytes <= {90: 0, 100: 8}[capability] and used.local_bytes == 0
    assert used.registers <= {90: 80, 100: 96}[capability]
    assert used.shared_bytes <= 1024
    programs = 65_536 // (used.registers * 32 * num_warps)
    assert programs * constexprs["STEPS"] * constexprs["LANES"] * size >= BYTES_IN_FLIGHT[capability]


@CAPABILITIES
@DTYPES
@ENTROPY
def test_gradient(dtype: str, size: int, with_entropy: bool, capability: int) -> None:
    """The shard's width is an argument, so one binary serves all widths."""
    constexprs, num_warps = _launch(GRADIENT_LAUNCH)
    used = compiled_resources(
        gradient_kernel,
        {
            "logits": f"*{dtype}:16",
            "labels": "*i64:16",
            "normalizers": "*fp32:16",
            "logps_grad": "*fp32:16",
            "entropy": "*fp32:16",
            "entropy_grad": "*fp32:16",
            "row_stride": "i32:16",
            "normalizers_stride": "i32:16",
            "columns": "i32:16",
            "all_columns": "i32:16",
            "first_row": "i32:16",
            "ignore_index": "i32",
        },
        {"WITH_ENTROPY": with_entropy, **constexprs},
        num_warps=num_warps,
        capability=capability,
    )
    assert used.stack_bytes == used.local_bytes == 0
    assert used.registers <= 64
    assert used.shared_bytes == 0
    programs = 65_536 // (used.registers * 32 * num_warps)
    assert programs * constexprs["BLOCK"] * size >= BYTES_IN_FLIGHT[capability]
