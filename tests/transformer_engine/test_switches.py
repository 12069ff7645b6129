"""Performance switches of Transformer Engine's layers: the result is that of the layers without them."""

from functools import partial
from typing import Any
from unittest import mock

import pytest

from tests.distributed.test_layouts import check_equal, gradients, joined
from tests.ranks import run_ranks
from tests.transformer_engine.ranks import needs_wheel, run_with_transformer_engine

pytestmark = needs_wheel


@pytest.fixture(scope="module")
def plain() -> tuple[dict, float, dict]:
    """What one rank of portable layers gives, without any switch."""
    return joined(run_ranks(gradients, 1, {}, {}))


FUSION = {
    "one rank": (1, {}, {}),
    "TP2 + SP": (2, {"tensor": 2, "sequence": True}, {}),
    "PP2 + VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "DP2, overlapped": (2, {}, {"optimizer": {"overlap": True}}),
    "full recompute": (1, {}, {"recompute": {"mode": "full"}}),
}


@pytest.mark.parametrize("name", FUSION)
def test_gradient_accumulation_fusion(name: str, plain: tuple[dict, float, dict]) -> None:
    """Every weight gradient of every pack goes into the buffer, and what autograd is given (NaN) nowhere."""
    world_size, parallel, sections = FUSION[name]
    results = run_with_transformer_engine(_fused_gradients, world_size, parallel, sections)
    check_equal(joined([found for found, _ in results]), plain)
    layers = 4 * parallel.get("tensor", 1) * (world_size if "DP" in name else 1)
    packs = 2 if "DP" in name else 4
    assert sum(count for _, count in results) == 4 * layers * packs, "QKV, projection, fc1 and fc2"


@pytest.mark.parametrize(
    ("ranks", "parallel", "recompute"),
    [
        (2, {"context": 2}, {}),
        (4, {"context": 2, "pipeline": 2}, {"mode": "selective"}),
        (4, {"context": 2, "tensor": 2, "sequence": True}, {"mode": "full"}),
    ],
)
def test_heads_over_context_parallel_ranks(ranks: int, parallel: dict[str, Any], recompute: dict) -> None:
    """`cp_comm_type=a2a`: Transformer Engine's order of tokens and heads is that of our zigzag split, forward
    and backward, on segments of unequal lengths."""
    model = {"num_key_value_heads": 4}
    expected = joined(run_ranks(gradients, 1, {}, {"model": model}))
    run = partial(gradients, portable=False)
    sections = {"model": model, "recompute": recompute}
    switches = {"parallel.cp_comm_type": "a2a"}
    found = joined(run_with_transformer_engine(run, ranks, parallel, sections, switches))
    check_equal(found, expected)


def _fused_gradients(parallel: dict[str, Any], sections: dict[str, Any]) -> tuple[Any, int]:
    """`gradients`, and how many multiplications wrote into a gradient buffer."""
    from tests.transformer_engine.stand_in import tex

    count, multiply = 0, tex.generic_gemm

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += args[4] is not None  # `out`
        return multiply(*args, **kwargs)

    run = partial(gradients, portable=False)
    with mock.patch.object(tex, "generic_gemm", counted):
        found = run(parallel, sections, {"optimizer.gradient_accumulation_fusion": True})
    return found, count
