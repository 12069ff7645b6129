"""Transformer Engine's layers give the portable layers' loss, gradient norm and gradients in every layout."""

from functools import partial
from typing import Any

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
    "recomputed norms, TP2 + SP": (
        2,
        {"tensor": 2, "sequence": True},
        {"recompute": {"mode": "selective", "modules": ["layernorm"]}},
    ),
    "tied embeddings, PP2": (2, {"pipeline": 2}, {"model": {"tie_word_embeddings": True}}),
    "CP2 x PP2": (4, {"context": 2, "pipeline": 2}, {}),
    "PP4, no layers at its ends": (
        4,
        {"pipeline": 4, "embedding_and_loss_as_layers": True},
        {"model": {"num_layers": 2}},
    ),
}
# gloo still reads a buffer while the interleaved schedule goes on, so it cannot be freed there on a CPU
FREES_OUTPUTS = {
    *("PP2", "PP4 (two middle stages)", "TP2 x CP2 x PP2", "CP2 x PP2", "tied embeddings, PP2"),
    "PP4, no layers at its ends",
}
# What one rank of portable layers is compared with has the same model.
MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "two layers": {"num_layers": 2},
}


@pytest.fixture(scope="module")
def portable() -> dict[str, tuple[dict, float, dict]]:
    """What one rank of portable layers gives for each model."""
    return {name: joined(run_ranks(gradients, 1, {}, {"model": model})) for name, model in MODELS.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_portable_layers(name: str, portable: dict[str, tuple[dict, float, dict]]) -> None:
    world_size, parallel, sections = LAYOUTS[name]
    run = partial(gradients, portable=False, frees_outputs=name in FREES_OUTPUTS)
    found = joined(run_with_transformer_engine(run, world_size, parallel, sections))
    (model,) = [name for name, keys in MODELS.items() if keys == sections.get("model", {})]
    check_equal(found, portable[model])


def _calls(sections: dict[str, Any]) -> dict[str, int]:
    """How often one step over four packs computes norms, matrix products and attention."""
    from tests.transformer_engine.stand_in import CALLS

    CALLS.clear()
    gradients({}, sections, portable=False)
    return dict(CALLS)


def _calls_of_each(modes: list[dict[str, Any]]) -> list[dict[str, int]]:
    return [_calls({"recompute": mode}) for mode in modes]


def test_what_is_recomputed() -> None:
    """4 layers, 4 packs. A layer has 2 norms, 4 matrices that are multiplied three times, and one attention;
    the last norm is recomputed by no mode. A module that is recomputed runs its forward pass once more, and
    the MLP's includes the norm that is fused into its first matrix."""
    modes: list[dict[str, Any]] = [
        {"mode": "none"},
        *({"mode": "selective", "modules": [module]} for module in ("core_attn", "mlp", "layernorm")),
        {"mode": "full"},
    ]
    (found,) = run_with_transformer_engine(_calls_of_each, 1, modes)
    names = ("rmsnorm_fwd", "generic_gemm", "packed_attention")
    assert [tuple(calls[name] for name in names) for calls in found] == [
        (4 * (4 * 2 + 1), 4 * 4 * 12, 4 * 4),
        (4 * (4 * 2 + 1), 4 * 4 * 12, 4 * 4 * 2),
        (4 * (4 * 3 + 1), 4 * 4 * (12 + 2), 4 * 4),
        (4 * (4 * 4 + 1), 4 * 4 * 12, 4 * 4),
        (4 * (4 * 4 + 1), 4 * 4 * (12 + 4), 4 * 4 * 2),
    ]
