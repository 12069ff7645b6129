"""Every layout gives one rank's loss, gradient norm and gradients, on packs of unequal segments."""

from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model

from megatron_post.convert.hf_reader import load_weights, open_weights
from megatron_post.convert.hf_writer import gathered_tensors
from megatron_post.data.pack import Pack
from megatron_post.models.build import build_model
from megatron_post.stages.sft import SFT
from megatron_post.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_post.train.parts import joined_ranks
from megatron_post.train.step import Stepper
from tests.distributed.gradients import gather_shards
from tests.ranks import run_ranks
from tests.tiny import switched, tiny_config, tiny_packs

LAYOUTS = {
    "TP2": (2, {"tensor": 2}, {}),
    "TP2 + SP": (2, {"tensor": 2, "sequence": True}, {}),
    "PP2": (2, {"pipeline": 2}, {}),
    "PP2 + VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "PP4 (two middle stages)": (4, {"pipeline": 4}, {}),
    "CP2": (2, {"context": 2}, {}),
    "DP2": (2, {}, {}),
    "DP2, overlapped": (2, {}, {"optimizer": {"overlap": True}}),
    "unfused loss": (1, {}, {"loss": {"impl": "unfused"}}),
    "unfused loss, TP2 + SP": (2, {"tensor": 2, "sequence": True}, {"loss": {"impl": "unfused"}}),
    "full recompute": (1, {}, {"recompute": {"mode": "full"}}),
    "selective recompute, TP2 + SP": (
        2,
        {"tensor": 2, "sequence": True},
        {"recompute": {"mode": "selective"}},
    ),
    "TP2 x CP2 x PP2": (8, {"tensor": 2, "context": 2, "pipeline": 2, "sequence": True}, {}),
}


def gradients(
    parallel: dict[str, Any],
    sections: dict[str, Any],
    switches: dict[str, Any] | None = None,
    *,
    portable: bool = True,
    frees_outputs: bool = False,
    packs: list[Pack] | None = None,
) -> tuple[dict[str, Any], float, dict[str, Any]]:
    """(metrics, gradient norm, gradients by Hugging Face name) of one step over `packs`, by default four.

    switches: performance switches. frees_outputs: free what was sent to the next pipeline stage, as runs on
    GPUs do.
    """
    config = switched(tiny_config(parallel=parallel, **sections), switches or {})
    with joined_ranks(config) as topology:
        models = build_model(config, topology, portable=portable)
        load_weights(models, open_weights(config.model, seed=3), config.model)
        for model in models:
            model.config.deallocate_pipeline_outputs = frees_outputs
        chunks = wrap_data_parallel(models, config, topology)
        optimizer = build_optimizer(chunks, config)
        stepper = Stepper(chunks, SFT(config.loss.trained_roles), topology, portable=portable)
        packs = tiny_packs() if packs is None else packs
        metrics = stepper(packs[topology.data_rank :: topology.data_size])
        optimizer.prepare_grads()
        norm = optimizer.get_grad_norm()
        for chunk in chunks:
            gather_shards(chunk)
        values = dict(
            gathered_tensors(unwrap_model(chunks), config.model, value_of=lambda p: p.main_grad.clone())
        )
        return metrics, norm, {name: value.numpy() for name, value in values.items()}


def joined(results: list[tuple[dict[str, Any], float, dict[str, Any]]]) -> tuple[dict, float, dict]:
    """Join the ranks' `gradients`. Metrics come from the last pipeline stage."""
    metrics = next(m for m, _, _ in reversed(results) if m)
    assert all(norm == pytest.approx(results[0][1], rel=1e-6) for _, norm, _ in results)
    return metrics, results[0][1], {name: g for _, _, part in results for name, g in part.items()}


@pytest.fixture(scope="module")
def one_rank() -> tuple[dict, float, dict]:
    return joined(run_ranks(gradients, 1, {}, {}))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name: str, one_rank: tuple[dict, float, dict]) -> None:
    check_equal(joined(run_ranks(gradients, *LAYOUTS[name])), one_rank)


# The embedding and the loss count as a layer each, so chunks of one layer leave none for these two.
WITHOUT_LAYERS = {
    "PP4": (4, {"pipeline": 4}, {"model": {"num_layers": 2, "tie_word_embeddings": True}}),
    "PP2 + VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {"model": {"num_layers": 2}}),
    "PP4, full recompute": (4, {"pipeline": 4}, {"model": {"num_layers": 2}, "recompute": {"mode": "full"}}),
}


@pytest.mark.parametrize("name", WITHOUT_LAYERS)
def test_first_and_last_chunk_without_layers(name: str) -> None:
    world_size, parallel, sections = WITHOUT_LAYERS[name]
    parallel = {**parallel, "embedding_and_loss_as_layers": True}
    expected = joined(run_ranks(gradients, 1, {}, sections))
    check_equal(joined(run_ranks(gradients, world_size, parallel, sections)), expected)


def check_equal(
    found: tuple[dict, float, dict], expected: tuple[dict, float, dict], *, count: int | None = None
) -> None:
    """Compare two results with a tolerance of 1e-5.

    fp32 sums of about a hundred terms in another order differ by about sqrt(100) x 6e-8, which is 1e-6. The
    tolerance allows for five layers in a chain. A wrong factor, a missing shard or a leaked segment exceeds
    it.
    """
    (metrics, norm, gradients), (expected_metrics, expected_norm, expected_gradients) = found, expected
    assert metrics["loss_count"] == expected_metrics["loss_count"]
    assert metrics["loss_count"] == count if count is not None else metrics["loss_count"] > 100
    assert metrics["loss"] == pytest.approx(expected_metrics["loss"], rel=1e-5)
    assert norm == pytest.approx(expected_norm, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for key, value in gradients.items():
        error = torch.linalg.vector_norm(torch.from_numpy(value - expected_gradients[key]))
        assert error <= 1e-5 * torch.linalg.vector_norm(torch.from_numpy(expected_gradients[key])), key
