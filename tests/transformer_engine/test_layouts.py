"""Transformer Engine's layers give the portable layers' loss, gradient norm and gradients in every layout."""

from functools import partial

import pytest

from tests.distributed import test_layouts
from tests.distributed.test_layouts import check_equal, gradients, joined
from tests.ranks import run_ranks
from tests.transformer_engine.ranks import needs_wheel, run_with_transformer_engine

pytestmark = needs_wheel

LAYOUTS = {
    "one rank": (1, {}, {}),
    **test_layouts.LAYOUTS,
    "full recompute, TP2 + SP": (2, {"tensor": 2, "sequence": True}, {"recompute": {"mode": "full"}}),
    **{
        f"selective recompute of {module}": (
            1,
            {},
            {"recompute": {"mode": "selective", "modules": [module]}},
        )
        for module in ("core_attn", "mlp", "layernorm")
    },
    "tied embeddings, PP2": (2, {"pipeline": 2}, {"model": {"tie_word_embeddings": True}}),
    "CP2 x PP2": (4, {"context": 2, "pipeline": 2}, {}),
}
# gloo still reads a buffer while the interleaved schedule goes on, so it cannot be freed there on a CPU
FREES_OUTPUTS = {"PP2", "PP4 (two middle stages)", "TP2 x CP2 x PP2", "CP2 x PP2", "tied embeddings, PP2"}


@pytest.fixture(scope="module")
def portable() -> dict[str, tuple[dict, float, dict]]:
    """What one rank of portable layers gives, untied and tied."""
    tied = {"model": {"tie_word_embeddings": True}}
    return {
        "untied": joined(run_ranks(gradients, 1, {}, {})),
        "tied": joined(run_ranks(gradients, 1, {}, tied)),
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_portable_layers(name: str, portable: dict[str, tuple[dict, float, dict]]) -> None:
    world_size, parallel, sections = LAYOUTS[name]
    run = partial(gradients, portable=False, frees_outputs=name in FREES_OUTPUTS)
    found = joined(run_with_transformer_engine(run, world_size, parallel, sections))
    check_equal(found, portable["tied" if "model" in sections else "untied"])
