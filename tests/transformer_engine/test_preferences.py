"""Reward model and DPO have the same loss and gradients on Transformer Engine's layers as on portable ones.

Rows in which responses share a prompt have Transformer Engine's linear layers and norms around our attention,
and fused rotary embeddings with an angle for every token. In fp32 they have the portable layers, with those
rotary embeddings too where Transformer Engine is installed.
"""

from functools import partial
from typing import Any

import pytest

from tests.distributed.test_layouts import check_equal, joined
from tests.distributed.test_preferences import LAYOUTS, preference_config, step
from tests.ranks import run_ranks
from tests.transformer_engine.ranks import needs_wheel, run_with_transformer_engine

pytestmark = needs_wheel

COUNTS = {"isolated": [3, 9], "concatenated": [3, 9], "separate": [2, 10]}
RECOMPUTED = {"recompute": {"mode": "selective", "modules": ["core_attn", "mlp", "layernorm"]}}


def _of(stage: str, layout: str, parallel: dict[str, Any], **sections: Any) -> tuple[Any, list[int], str]:
    sections[stage] = {"layout": layout}
    rows = "separate" if layout == "separate" else "isolated_pairs" if stage == "dpo" else "isolated"
    return preference_config(stage, parallel, **sections), COUNTS[layout], rows


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], tuple[dict, float, dict]]:
    """What one rank of portable layers gives without Transformer Engine."""
    kinds = [("reward", "isolated"), ("reward", "concatenated")]
    kinds += [("dpo", "separate"), ("dpo", "isolated")]
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


@pytest.mark.parametrize("layout", ["separate", "isolated"])
@pytest.mark.parametrize("name", ["TP2 + SP", "CP2"])
def test_dpo(name: str, layout: str, expected: Any) -> None:
    _check(name, expected, "dpo", layout)
