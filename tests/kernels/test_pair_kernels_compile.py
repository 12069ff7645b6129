"""The kernels of `dpo_loss` and `ranking_loss` compile for Hopper and Blackwell without spills."""

from typing import Any

import pytest
from megatron_post_kernels.pair_losses import LOSSES

from tests.kernels.compiling import CAPABILITIES, Resources, compiled_resources

pytest.importorskip("triton")

from megatron_post_kernels.dpo_loss_kernels import spread_slopes, sum_segments, take_pairs
from megatron_post_kernels.ranking_loss_kernels import rank_pairs

KINDS = {
    **dict.fromkeys(("logps", "reference", "sums", "losses", "metrics", "slopes", "upstream"), "*fp32:16"),
    **dict.fromkeys(("scores", "weights", "loss", "margins", "gradient"), "*fp32:16"),
    **dict.fromkeys(("chosen", "rejected", "better", "worse"), "*i64:16"),
    **dict.fromkeys(("num_segments", "num_pairs", "num_scores"), "i32"),
    **dict.fromkeys(("beta", "noise", "margin", "nll_weight"), "fp32"),
    "trained": "*i1:16",
    "cu_seqlens": "*i32:16",
}
TOKENS = {"MAX_LOG_RATIO": 60.0, "BLOCK": 1024}  # the values with which dpo_loss.py launches them


def _compiled(kernel: Any, constants: dict[str, Any], capability: int) -> Resources:
    """Compile and check that nothing spills. Sums over four warps need little shared memory."""
    signature = {name: KINDS[name] for name in kernel.arg_names if name not in constants}
    used = compiled_resources(kernel, signature, constants, num_warps=4, capability=capability)
    assert used.stack_bytes == used.local_bytes == 0
    assert used.shared_bytes <= 4096
    return used


@CAPABILITIES
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("split", [False, True])
def test_take_pairs(name: str, split: bool, capability: int) -> None:
    """At most 128 registers let four programs share a multiprocessor.

    Four sums of 1,024 lanes on 128 threads take 32 registers per thread, and the values in flight take as
    many. With context parallelism the sums are inputs, so there is no block of tokens and 64 registers
    suffice.
    """
    constants = {**TOKENS, "LOSS": name, "NLL_PER_TOKEN": True} | ({} if split else {"sums": None})
    assert _compiled(take_pairs, constants, capability).registers <= (64 if split else 128)


@CAPABILITIES
@pytest.mark.parametrize("has_reference", [False, True])
def test_sum_segments(has_reference: bool, capability: int) -> None:
    constants = TOKENS if has_reference else {**TOKENS, "reference": None}
    assert _compiled(sum_segments, constants, capability).registers <= 128


@CAPABILITIES
def test_spread_slopes(capability: int) -> None:
    assert _compiled(spread_slopes, {"BLOCK": 1024, "PAIR_BLOCK": 128}, capability).registers <= 64


@CAPABILITIES
def test_rank_pairs(capability: int) -> None:
    """A tile of 32 x 64 fp32 takes 16 registers on each of 128 threads."""
    assert _compiled(rank_pairs, {"SCORES": 32, "PAIRS": 64}, capability).registers <= 128
