"""Performance switches of Transformer Engine's layers: the result is that of the layers without them."""

import os
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_post.train.parts import joined_ranks
from megatron_post.train.step import Stepper
from tests.distributed.test_layouts import check_equal, gradients, joined
from tests.ranks import run_ranks
from tests.tiny import switched, tiny_config
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
    sections = {"model": model, "recompute": recompute}
    results = run_with_transformer_engine(_exchanging, ranks, parallel, sections)
    check_equal(joined([found for found, _ in results]), expected)
    passes = 4 * 4 // parallel.get("pipeline", 1)  # layers x packs
    assert [calls for _, calls in results] == [passes * (2 if recompute else 1)] * ranks


def _exchanging(parallel: dict[str, Any], sections: dict[str, Any]) -> tuple[Any, int]:
    """`gradients`, and in how many forward passes of attention heads were exchanged."""
    from tests.transformer_engine.stand_in import CALLS

    found = gradients(parallel, sections, {"parallel.cp_comm_type": "a2a"}, portable=False)
    return found, CALLS["_exchanged_attention"]


USER_BUFFERS = {
    "TP2": (2, {"tensor": 2, "sequence": True}, {}),
    "TP2 x PP2 x VPP2": (4, {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2}, {}),
    "TP2 x CP2": (4, {"tensor": 2, "sequence": True, "context": 2}, {}),
    "TP2, full recompute": (2, {"tensor": 2, "sequence": True}, {"recompute": {"mode": "full"}}),
    "TP2, recomputed norms": (
        2,
        {"tensor": 2, "sequence": True},
        {"recompute": {"mode": "selective", "modules": ["layernorm"]}},
    ),
}


@pytest.mark.parametrize("name", USER_BUFFERS)
def test_tensor_parallel_communication_in_user_buffers(name: str, plain: tuple[dict, float, dict]) -> None:
    """Every gather and scatter of the layers goes through the buffers: one before or behind each of the four
    multiplications forward, in the backward pass two beside those of QKV and fc1, and one before those of the
    projection and fc2. A forward pass that is recomputed scatters, and gathers only the second time. Where
    norms are recomputed, megatron-core gives the matrices behind them no buffers in the backward pass."""
    ranks, parallel, sections = USER_BUFFERS[name]
    results = run_with_transformer_engine(_through_user_buffers, ranks, parallel, sections)
    check_equal(joined([found for found, _ in results]), plain)
    passes = 4 * 4 // parallel.get("pipeline", 1)  # layers x packs
    forward, beside, before = 4, 4, 2
    if "recomputed norms" in name:
        beside = 0
    elif sections:
        forward += 2
    assert [moves for _, moves in results] == [passes * (forward + beside + before)] * ranks


def test_switches_together(plain: tuple[dict, float, dict]) -> None:
    """Also an evaluation between steps, whose layers gather without buffers and scatter with them."""
    parallel = {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2}
    results = run_with_transformer_engine(_together, 4, parallel)
    check_equal(joined([found for found, _ in results]), plain)
    evaluated = [metrics for _, metrics in results if metrics]
    assert [metrics["loss"] for metrics in evaluated] == pytest.approx([plain[0]["loss"]] * 2, rel=1e-5)


def _together(parallel: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """`gradients` with every switch that the layout can have, and the metrics of an evaluation before."""
    switches = {
        "parallel.tp_comm_overlap": True,
        "optimizer.gradient_accumulation_fusion": True,
        "optimizer.overlap": True,
        "optimizer.overlap_param_gather_with_optimizer_step": True,
    }
    evaluated: dict[str, float] = {}
    step = Stepper.__call__

    def evaluate_first(self: Stepper, packs: Any, **keys: Any) -> dict[str, float]:
        with torch.no_grad():
            evaluated.update(step(self, packs, forward_only=True))
        return step(self, packs, **keys)

    with (
        mock.patch.dict(os.environ, UB_SKIPMC="1"),
        mock.patch.object(Stepper, "__call__", evaluate_first),
    ):
        return gradients(parallel, {}, switches, portable=False), evaluated


def test_user_buffers_that_gpus_cannot_share() -> None:
    (message,) = run_with_transformer_engine(_without_multicast, 1)
    assert "needs GPUs, a driver and a CUDA with multicast; set UB_SKIPMC=1" in message


def _without_multicast() -> str:
    config = switched(tiny_config(), {"parallel.tp_comm_overlap": True})
    with pytest.raises(ValueError, match="tp_comm_overlap=true") as caught, joined_ranks(config):
        pass
    return str(caught.value)


def _through_user_buffers(parallel: dict[str, Any], sections: dict[str, Any]) -> tuple[Any, int]:
    """`gradients`, and how often a buffer was gathered or scattered."""
    from tests.transformer_engine.stand_in import CALLS

    with mock.patch.dict(os.environ, UB_SKIPMC="1"):
        found = gradients(parallel, sections, {"parallel.tp_comm_overlap": True}, portable=False)
    return found, CALLS["gather"] + CALLS["scatter"]


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
