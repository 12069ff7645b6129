"""Adapters give one rank's loss and gradients in every layout, and `peft`'s on the same weights."""

from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model

from megatron_post.convert.adapter_weights import gathered_adapters, load_adapters, peft_shapes
from megatron_post.convert.hf_reader import load_weights, open_weights
from megatron_post.models.build import build_model
from megatron_post.stages.sft import SFT
from megatron_post.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_post.train.parts import joined_ranks
from megatron_post.train.step import Stepper
from tests.distributed.gradients import gather_shards
from tests.distributed.test_layouts import check_equal, joined
from tests.ranks import run_ranks
from tests.tiny import switched, tiny_config, tiny_packs

ADAPTER = {"rank": 3, "alpha": 12.0}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}, {}),
    "TP2 + SP": (2, {"tensor": 2, "sequence": True}, {}),
    "PP2": (2, {"pipeline": 2}, {}),
    "PP2 + VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "CP2": (2, {"context": 2}, {}),
    "DP2": (2, {}, {}),
    "DP2, overlapped": (2, {}, {"optimizer": {"overlap": True}}),
    "full recompute": (1, {}, {"recompute": {"mode": "full"}}),
    "recomputed MLP": (1, {}, {"recompute": {"mode": "selective", "modules": ["mlp"]}}),
    "TP2 x CP2 x PP2": (8, {"tensor": 2, "context": 2, "pipeline": 2, "sequence": True}, {}),
}


class RandomParts:
    """An adapter whose parts are all random, so that each of them has a gradient."""

    def __init__(self, config: Any) -> None:
        self._shapes = peft_shapes(config.adapter, config.model)

    def read(self, name: str) -> torch.Tensor:
        number = list(self._shapes).index(name)
        values = torch.randn(self._shapes[name], generator=torch.Generator().manual_seed(number))
        return values * 0.1 if values.dim() == 2 else 1 + 0.1 * values


def gradients(
    parallel: dict[str, Any],
    sections: dict[str, Any],
    adapter: dict[str, Any],
    *,
    portable: bool = True,
    frees_outputs: bool = False,
    switches: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], float, dict[str, Any]]:
    """(metrics, gradient norm, gradients by PEFT's name) of one step over four packs."""
    config = tiny_config(parallel=parallel, adapter=ADAPTER | adapter, **sections)
    config = switched(config, switches or {})
    with joined_ranks(config) as topology:
        models = build_model(config, topology, portable=portable)
        load_weights(models, open_weights(config.model, seed=3), config.model)
        load_adapters(models, RandomParts(config))
        for model in models:
            model.config.deallocate_pipeline_outputs = frees_outputs
        chunks = wrap_data_parallel(models, config, topology)
        optimizer = build_optimizer(chunks, config)
        stage = SFT(config.loss.trained_roles)
        stepper = Stepper(chunks, stage, topology, portable=portable, dropout_seed=7)
        metrics = stepper(tiny_packs()[topology.data_rank :: topology.data_size])
        optimizer.prepare_grads()
        norm = optimizer.get_grad_norm()
        for chunk in chunks:
            gather_shards(chunk)
        values = gathered_adapters(unwrap_model(chunks), value_of=lambda p: p.main_grad.clone())
        return metrics, norm, {name: value.numpy().copy() for name, value in values}


KINDS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"kind": "dora"}, "dropout": {"dropout": 0.3}}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, tuple[dict, float, dict]]:
    found = {kind: joined(run_ranks(gradients, 1, {}, {}, keys)) for kind, keys in KINDS.items()}
    assert len({round(metrics["loss"], 1) for metrics, _, _ in found.values()}) == len(KINDS)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name: str, kind: str, one_rank: dict[str, tuple[dict, float, dict]]) -> None:
    check_equal(joined(run_ranks(gradients, *LAYOUTS[name], KINDS[kind])), one_rank[kind])


FEW = {"targets": ["k_proj", "v_proj", "up_proj"]}


@pytest.mark.parametrize("mode", [{"mode": "none"}, {"mode": "selective", "modules": ["mlp"]}])
def test_few_targets(mode: dict[str, Any]) -> None:
    """A fused layer may have adapters for some of its matrices only."""
    expected = joined(run_ranks(gradients, 1, {}, {}, FEW))
    assert {name.split(".")[6] for name in expected[2]} == set(FEW["targets"])
    found = joined(run_ranks(gradients, 2, {"tensor": 2, "sequence": True}, {"recompute": mode}, FEW))
    check_equal(found, expected)


def test_chunks_without_layers() -> None:
    """The first and the last pipeline rank have no layers, so nothing is trained on them."""
    sections = {"model": {"num_layers": 2}}
    parallel = {"pipeline": 4, "embedding_and_loss_as_layers": True}
    expected = joined(run_ranks(gradients, 1, {}, sections, {}))
    check_equal(joined(run_ranks(gradients, 4, parallel, sections, {})), expected)
