"""Every stage but SFT with adapters in every layout. DPO's reference is the model without its adapter."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from megatron.core.utils import unwrap_model

from megatron_post.config.schema import Config
from megatron_post.convert.adapter_weights import HEAD, gathered_adapters, load_adapters
from megatron_post.convert.hf_reader import load_weights
from megatron_post.convert.hf_writer import gathered_tensors
from megatron_post.data.pack import Pack, pack_of_segments
from megatron_post.models.build import build_model
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_post.train.parts import make_stage
from megatron_post.train.step import Stepper
from tests.comparisons import PACK_LENGTH, examples, packs
from tests.distributed.gradients import gather_shards
from tests.distributed.test_adapters import ADAPTER, KINDS, RandomParts
from tests.distributed.test_pretrain import document_packs
from tests.distributed.test_step_reward import SOLUTIONS, WithBias
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


def _packs(config: Config) -> list[Pack]:
    """The packs of one step."""
    if config.stage == "pretrain":
        return document_packs(config)
    if config.stage == "step_reward":
        parts = [SOLUTIONS[:2], SOLUTIONS[2:5], SOLUTIONS[5:6], SOLUTIONS[6:]]
        return [pack_of_segments(part, pack_length=PACK_LENGTH, segment_multiple=4) for part in parts]
    return packs(PAIRS, counts=[2, 5, 1, 4], layout="isolated" if config.stage == "reward" else "separate")


def step(
    stage: str,
    parallel: dict[str, Any],
    adapter: dict[str, Any],
    *,
    copied: bool = False,
    recompute: str = "none",
    **sections: dict[str, Any],
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics and gradients of one step. copied: the reference is a second copy of the base."""
    config = tiny_config(
        stage=stage,
        data={} if stage == "pretrain" else {"pack_length": PACK_LENGTH},
        parallel=parallel,
        adapter=ADAPTER | adapter,
        recompute={"mode": recompute},
        **({"dpo": {"reference": "base"}} if stage == "dpo" else {}),
        **sections,
    )
    scalar = config.traits.scalar_head
    with parallel_run(config.parallel, seed=1) as topology:
        steps = config.traits.scores_steps
        weights = WithBias(config.model, seed=3, scalar_head=scalar, scores_steps=steps)
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
        metrics = stepper(_packs(config)[topology.data_rank :: topology.data_size])
        optimizer.prepare_grads()
        for chunk in chunks:
            assert chunk.training
            gather_shards(chunk)
        bare, found = unwrap_model(chunks), {}

        def gradient(parameter: Any) -> Any:
            return parameter.main_grad.clone()

        if scalar:
            found = dict(gathered_tensors(bare, config.model, value_of=gradient, only=set(HEAD)))
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
        # The gradient of a bias is a mean of p - y, whose terms of size up to 1 cancel.
        size = 1.0 if name == "score.bias" else np.linalg.norm(expected[1][name])
        assert np.linalg.norm(value - expected[1][name]) <= relative * size, name


@pytest.fixture(scope="module")
def copied() -> dict[str, tuple[dict, dict]]:
    return {kind: _run(1, "dpo", {}, KINDS[kind], copied=True) for kind in ("lora", "dora")}


@pytest.fixture(scope="module")
def reward() -> tuple[dict, dict]:
    return _run(1, "reward", {}, {})


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_without_adapter(name: str, copied: dict[str, tuple[dict, dict]]) -> None:
    """A step whose reference is the base equals one with a second copy of the model on one rank."""
    world_size, parallel = LAYOUTS[name]
    kind = "dora" if name in ("one rank", "TP2 + SP") else "lora"
    found = _run(world_size, "dpo", parallel, KINDS[kind])
    assert abs(found[0]["kl"]) > 1e-2  # the adapter changes the policy
    _check(found, copied[kind], relative=1e-6 if name == "one rank" else 2e-5)


def test_reference_of_recomputed_layers(copied: dict[str, tuple[dict, dict]]) -> None:
    found = _run(1, "dpo", {}, {}, recompute="full")
    _check(found, copied["lora"], relative=1e-6)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one rank"])
def test_reward(name: str, reward: tuple[dict, dict]) -> None:
    """The head is trained in full beside the adapter."""
    world_size, parallel = LAYOUTS[name]
    assert "score.weight" in reward[1]
    _check(_run(world_size, "reward", parallel, {}), reward, relative=2e-5)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "step_reward": ({}, "dora"),
    "pretrain": ({"pretrain": {"attention": "pack"}}, "lora"),
}


def _run_other(stage: str, world_size: int, parallel: dict[str, Any]) -> tuple[dict, dict]:
    sections, kind = OTHERS[stage]
    return _run(world_size, stage, parallel, KINDS[kind], **sections)


@pytest.fixture(scope="module")
def others() -> dict[str, tuple[dict, dict]]:
    return {stage: _run_other(stage, 1, {}) for stage in OTHERS}


@pytest.mark.parametrize("stage", OTHERS)
@pytest.mark.parametrize("name", ["TP2", "TP2 + SP", "PP2", "CP2", "TP2 x CP2 x PP2"])
def test_steps_and_documents(name: str, stage: str, others: dict[str, tuple[dict, dict]]) -> None:
    """The head of a model that scores steps is trained in full, with its bias."""
    heads = {key for key in others[stage][1] if key.startswith("score.")}
    assert heads == (set(HEAD) if stage == "step_reward" else set())
    _check(_run_other(stage, *LAYOUTS[name]), others[stage], relative=1e-5)
