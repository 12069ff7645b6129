"""Adapters on Transformer Engine's layers give the portable layers' loss and gradients in every layout."""

from functools import partial
from typing import Any

import pytest

from tests.distributed.test_adapters import KINDS, LAYOUTS, gradients
from tests.distributed.test_layouts import check_equal, joined
from tests.ranks import run_ranks
from tests.transformer_engine.ranks import needs_wheel, run_with_transformer_engine

pytestmark = needs_wheel

FREES_OUTPUTS = {"PP2", "TP2 x CP2 x PP2"}
CASES: dict[str, Any] = {
    "one rank": (1, {}, {}),
    **LAYOUTS,
    "full recompute, TP2 + SP": (2, {"tensor": 2, "sequence": True}, {"recompute": {"mode": "full"}}),
    "recomputed norms, TP2 + SP": (
        2,
        {"tensor": 2, "sequence": True},
        {"recompute": {"mode": "selective", "modules": ["layernorm"]}},
    ),
}


@pytest.fixture(scope="module")
def portable() -> dict[str, tuple[dict, float, dict]]:
    return {kind: joined(run_ranks(gradients, 1, {}, {}, keys)) for kind, keys in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_layout_equals_portable_layers(
    name: str, kind: str, portable: dict[str, tuple[dict, float, dict]]
) -> None:
    run = partial(gradients, portable=False, frees_outputs=name in FREES_OUTPUTS)
    found = joined(run_with_transformer_engine(run, *CASES[name], KINDS[kind]))
    check_equal(found, portable[kind])
