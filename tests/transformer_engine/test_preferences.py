"""Reward model and DPO have the same loss and gradients on Transformer Engine's layers as on portable ones.

Rows in which responses share a prompt have Transformer Engine's linear layers and norms around our attention,
and fused rotary embeddings with an angle for every token. In fp32 they have the portable layers, with those
rotary embeddings too where Transformer Engine is installed.
"""

import dataclasses
from functools import partial
from typing import Any
from unittest import mock

import pytest

from tests.distributed import test_preferences
from tests.distributed.test_layouts import check_equal, joined
from tests.distributed.test_preferences import LAYOUTS, preference_config, step
from tests.ranks import run_ranks
from tests.transformer_engine.ranks import needs_wheel, run_with_transformer_engine

pytestmark = needs_wheel

COUNTS = {"isolated": [3, 9], "concatenated": [3, 9], "separate": [2, 10]}
RECOMPUTED = {"recompute": {"mode": "selective", "modules": ["core_attn", "mlp", "layernorm"]}}


def _of(stage: str, layout: str, parallel: dict[str, Any], **sections: Any) -> tuple[Any, list[int], str]:
    if stage == "reward":
        sections["reward"] = {"layout": layout}
    rows = "separate" if layout == "separate" else "isolated"
    return preference_config(stage, parallel, **sections), COUNTS[layout], rows


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], tuple[dict, float, dict]]:
    """What one rank of portable layers gives without Transformer Engine."""
    kinds = [("reward", "isolated"), ("reward", "concatenated"), ("dpo", "separate")]
    return {kind: joined(run_ranks(step, 1, *_of(*kind, {}))) for kind in kinds}


def _check(
    name: str, expected: Any, stage: str, layout: str, *, portable: bool = False, **sections: Any
) -> None:
    world_size, parallel = LAYOUTS[name]
    run = partial(step, portable=portable)
    found = run_with_transformer_engine(run, world_size, *_of(stage, layout, parallel, **sections))
    check_equal(joined(found), expected[stage, layout], count=12)


@pytest.mark.parametrize("name", ["one rank", "TP2 + SP", "PP2", "CP2", "TP2 x CP2 x PP2"])
def test_shared_prompts(name: str, expected: Any) -> None:
    _check(name, expected, "reward", "isolated")


@pytest.mark.parametrize(("name", "sections"), [("TP2 + SP", RECOMPUTED), ("CP2", {})])
def test_portable_layers_beside_transformer_engine(name: str, sections: Any, expected: Any) -> None:
    _check(name, expected, "reward", "isolated", portable=True, **sections)


def test_responses_that_see_earlier_ones(expected: Any) -> None:
    _check("TP2 + SP", expected, "reward", "concatenated")


@pytest.mark.parametrize("name", ["TP2 + SP", "CP2"])
def test_shared_prompts_recomputed(name: str, expected: Any) -> None:
    _check(name, expected, "reward", "isolated", **RECOMPUTED)


class _NextTokens:
    """Trains the responses' tokens behind prompts that they share, as DPO over such rows would."""

    head = "lm"

    def collate(self, pack: Any) -> Any:
        from megatron_post.config.losses import Reward as Settings
        from megatron_post.data.batch import batch_of_pack, role_numbers
        from megatron_post.stages.comparisons import SegmentSums
        from megatron_post.stages.reward import Reward

        trained = batch_of_pack(pack, role_numbers(["body"])).trained
        behind_prompts = Reward(Settings(layout="isolated"), SegmentSums()).collate(pack)
        return dataclasses.replace(behind_prompts, trained=trained)

    def loss(self, output: Any, batch: Any) -> Any:
        loss, count = -(output * batch.trained).sum(), batch.trained.sum().int()
        return loss, count, {"loss": (loss.detach(), count)}


def _next_tokens(parallel: dict[str, Any], *, portable: bool) -> Any:
    from megatron_post.config.schema import Config

    with (
        mock.patch.object(Config, "shares_prompts", property(lambda _: True)),
        mock.patch.object(test_preferences, "make_stage", lambda *_: _NextTokens()),
    ):
        config = preference_config("sft", parallel)
        return step(config, COUNTS["isolated"], "isolated", portable=portable)


def test_shared_prompts_of_a_language_model() -> None:
    """Nothing in the layers is the reward model's: next tokens are trained in such rows alike."""
    expected = joined(run_ranks(partial(_next_tokens, portable=True), 1, {}))
    run = partial(_next_tokens, portable=False)
    found = run_with_transformer_engine(run, 2, {"tensor": 2, "sequence": True})
    check_equal(joined(found), expected)


@pytest.mark.parametrize("name", ["TP2 + SP", "CP2"])
def test_dpo(name: str, expected: Any) -> None:
    _check(name, expected, "dpo", "separate")
