"""Reward model and DPO with adapters in every layout. DPO's reference is the model without its adapter."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from megatron.core.utils import unwrap_model

from megatron_post.convert.adapter_weights import gathered_adapters, load_adapters
from megatron_post.convert.hf_reader import RandomWeights, load_weights
from megatron_post.convert.hf_writer import gathered_tensors
from megatron_post.models.build import build_model
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_post.train.parts import make_stage
from megatron_post.train.step import Stepper
from tests.comparisons import PACK_LENGTH, examples, packs
from tests.distributed.gradients import gather_shards
from tests.distributed.test_adapters import ADAPTER, KINDS, RandomParts
from tests.ranks import run_ranks
from tests.tiny import tiny_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2 + SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 + VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "DP2": (2, {}),
    "TP2 x CP2 x PP2": (8, {"tensor": 2, "context": 2, "pipeline": 2, "sequence": True}),
}
PAIRS = examples(12)


def step(
    stage: str, parallel: dict[str, Any], adapter: dict[str, Any], *, copied: bool, recompute: str = "none"
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics and gradients of one step. copied: the reference is a second copy of the base."""
    config = tiny_config(
        stage=stage,
        data={"pack_length": PACK_LENGTH},
        parallel=parallel,
        adapter=ADAPTER | adapter,
        recompute={"mode": recompute},
        **({"dpo": {"reference": "base"}} if stage == "dpo" else {}),
    )
    scalar = config.traits.scalar_head
    with parallel_run(config.parallel, seed=1) as topology:
        weights = RandomWeights(config.model, seed=3, scalar_head=scalar)
        models = build_model(config, topology)
        load_weights(models, weights, config.model)
        load_adapters(models, RandomParts(config))
        chunks: Any = wrap_data_parallel(models, config, topology)
        reference = chunks if stage == "dpo" else None
        if copied:
            reference = build_model(config.model_copy(update={"adapter": None}), topology)
            load_weights(reference, weights, config.model)
        optimizer = build_optimizer(chunks, config)
        stepper = Stepper(chunks, make_stage(config, topology), topology, portable=True, reference=reference)
        made = packs(PAIRS, counts=[2, 5, 1, 4], layout="isolated" if scalar else "separate")
        metrics = stepper(made[topology.data_rank :: topology.data_size])
        optimizer.prepare_grads()
        for chunk in chunks:
            assert chunk.training
            gather_shards(chunk)
        bare, found = unwrap_model(chunks), {}

        def gradient(parameter: Any) -> Any:
            return parameter.main_grad.clone()

        if scalar:
            found = dict(gathered_tensors(bare, config.model, value_of=gradient, only={"score.weight"}))
        found |= dict(gathered_adapters(bare, value_of=gradient))
        return metrics, {name: value.numpy().copy() for name, value in found.items()}


def _run(world_size: int, *arguments: Any, **keywords: Any) -> tuple[dict, dict]:
    results = run_ranks(partial(step, **keywords), world_size, *arguments)
    metrics = next(m for m, _ in reversed(results) if m)
    return metrics, {name: value for _, part in results for name, value in part.items()}


def _check(found: tuple[dict, dict], expected: tuple[dict, dict], *, relative: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=relative, abs=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, value in found[1].items():
        error = np.linalg.norm(value - expected[1][name])
        assert error <= relative * np.linalg.norm(expected[1][name]), name


@pytest.fixture(scope="module")
def copied() -> dict[str, tuple[dict, dict]]:
    return {kind: _run(1, "dpo", {}, KINDS[kind], copied=True) for kind in ("lora", "dora")}


@pytest.fixture(scope="module")
def reward() -> tuple[dict, dict]:
    return _run(1, "reward", {}, {}, copied=False)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_without_adapter(name: str, copied: dict[str, tuple[dict, dict]]) -> None:
    """A step whose reference is the base equals one with a second copy of the model on one rank."""
    world_size, parallel = LAYOUTS[name]
    kind = "dora" if name in ("one rank", "TP2 + SP") else "lora"
    found = _run(world_size, "dpo", parallel, KINDS[kind], copied=False)
    assert abs(found[0]["kl"]) > 1e-2  # the adapter changes the policy
    _check(found, copied[kind], relative=1e-6 if name == "one rank" else 2e-5)


def test_reference_of_recomputed_layers(copied: dict[str, tuple[dict, dict]]) -> None:
    found = _run(1, "dpo", {}, {}, copied=False, recompute="full")
    _check(found, copied["lora"], relative=1e-6)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one rank"])
def test_reward(name: str, reward: tuple[dict, dict]) -> None:
    """The head is trained in full beside the adapter."""
    world_size, parallel = LAYOUTS[name]
    assert "score.weight" in reward[1]
    _check(_run(world_size, "reward", parallel, {}, copied=False), reward, relative=2e-5)
