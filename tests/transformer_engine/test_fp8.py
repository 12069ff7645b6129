"""What megatron-core and Transformer Engine do with FP8, but for the numbers.

Transformer Engine refuses the GPUs, versions of CUDA and widths that we refuse for each recipe. The branches
that megatron-core has for FP8, such as another recomputation, give in fp32 the result of the others.
"""

import contextlib
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_post.config.fp8 import RECIPES, refusal
from megatron_post.config.load import ConfigError
from tests.distributed import test_adapters
from tests.distributed.test_layouts import check_equal, gradients, joined
from tests.ranks import run_ranks
from tests.tiny import tiny_config
from tests.transformer_engine.ranks import needs_wheel, run_with_transformer_engine

pytestmark = needs_wheel

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
CUDA = ["12.6", "12.8", "12.9", "13.0"]
# models of one layer that miss one width each, besides one that fits every recipe; heads of 8 to 32
MODELS: list[dict[str, int]] = [
    {"hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
    {"hidden_size": 256, "ffn_hidden_size": 520, "num_attention_heads": 4, "num_key_value_heads": 2},
    {"hidden_size": 256, "ffn_hidden_size": 528, "num_attention_heads": 4, "num_key_value_heads": 2},
    {"hidden_size": 256, "ffn_hidden_size": 544, "num_attention_heads": 4, "num_key_value_heads": 2},
    {"hidden_size": 72, "ffn_hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
    {"hidden_size": 64, "ffn_hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 1},
    {"hidden_size": 128, "ffn_hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 1},
    {"hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 1},
]


def _config(recipe: str, **sections: Any) -> Any:
    return tiny_config(precision={"dtype": "bf16", "fp8": recipe}, data={"pack_length": 128}, **sections)


def _transformer_engines_answers() -> tuple[dict[str, str], set[tuple], list[set[str]]]:
    """The class of each recipe, the (recipe, GPU, CUDA) that it refuses, and of each model the recipes that
    refuse one of its matrices."""
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_post.models.build import transformer_config
    from megatron_post.parallel.topology import parallel_run

    fits = _config("delayed", model=MODELS[0])
    with parallel_run(fits.parallel, seed=1) as topology:
        recipes = {}
        for name in RECIPES:
            precision = fits.precision.model_copy(update={"fp8": name})
            core = transformer_config(fits.model_copy(update={"precision": precision}))
            recipes[name] = get_fp8_recipe(core)
        wrong = [_cannot_multiply(_matrices(model, topology)) for model in MODELS]
    return {name: type(recipe).__name__ for name, recipe in recipes.items()}, _refused(recipes), wrong


def _refused(recipes: dict[str, Any]) -> set[tuple]:
    import transformer_engine.pytorch.quantization as te

    found = set()
    for (name, recipe), capability, cuda in product(recipes.items(), CAPABILITIES, CUDA):
        for check in (te.check_fp8_support, te.check_mxfp8_support, te.check_fp8_block_scaling_support):
            check.cache_clear()
        with (
            mock.patch.object(te, "get_device_compute_capability", lambda capability=capability: capability),
            mock.patch.object(torch.version, "cuda", cuda),
        ):
            try:
                te.check_recipe_support(recipe)
            except AssertionError:
                found.add((name, capability, cuda))
    return found


def _matrices(model: dict[str, int], topology: Any) -> list[Tensor]:
    """The weights of one layer of Transformer Engine's, as forward passes multiply them and, transposed, as
    backward passes do."""
    import transformer_engine.pytorch as te

    from megatron_post.models.build import build_model

    (llama,) = build_model(tiny_config(model={**model, "num_layers": 1}), topology, portable=False)
    linears = (te.Linear, te.LayerNormLinear)
    weights = [module.weight.detach() for module in llama.modules() if isinstance(module, linears)]
    assert len(weights) == 4
    return [matrix for weight in weights for matrix in (weight, weight.t())]


def _cannot_multiply(matrices: list[Tensor]) -> set[str]:
    """The recipes that do not take one of these matrices."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
    from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec

    kind = tex.DType.kFloat8E4M3
    quantizers = {
        "blockwise": Float8BlockQuantizer(kind, rowwise=True, columnwise=True),
        "mxfp8": MXFP8Quantizer(kind),
    }
    found = {
        name
        for name, quantizer in quantizers.items()
        if not all(quantizer.is_quantizable(matrix) for matrix in matrices)
    }
    try:
        assert_dim_for_fp8_exec(*matrices)
    except AssertionError:
        found |= {"delayed", "tensorwise"}
    return found


def _refused_by_us(recipe: str, model: dict[str, int]) -> bool:
    try:
        _config(recipe, model=model)
    except ConfigError as error:
        assert f"precision.fp8={recipe}" in str(error)
        return True
    return False


@pytest.fixture(scope="module")
def answers() -> tuple[dict[str, str], set[tuple], list[set[str]]]:
    (found,) = run_with_transformer_engine(_transformer_engines_answers, 1)
    return found


def test_every_recipe_is_made(answers: Any) -> None:
    assert answers[0] == {
        "delayed": "TEDelayedScaling",
        "tensorwise": "Float8CurrentScaling",
        "blockwise": "Float8BlockScaling",
        "mxfp8": "MXFP8BlockScaling",
    }


def test_gpus_and_cuda(answers: Any) -> None:
    ours = {
        (recipe, capability, cuda)
        for recipe, capability, cuda in product(RECIPES, CAPABILITIES, CUDA)
        if refusal(recipe, capability=capability, cuda=cuda)
    }
    assert ours == answers[1]


def test_widths(answers: Any) -> None:
    ours = [{recipe for recipe in RECIPES if _refused_by_us(recipe, model)} for model in MODELS]
    assert ours == answers[2]
    assert ours[0] == set() and {len(refused) for refused in ours} == {0, 1, 2, 4}


FP8 = {"precision.fp8": "tensorwise"}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "full": {"mode": "full"},
    "selective": {"mode": "selective", "modules": ["core_attn", "mlp", "layernorm"]},
}


def _without_quantization() -> Any:
    """Layers run outside of Transformer Engine's FP8 context, although FP8 is configured."""
    import megatron.core.transformer.transformer_block as block

    return mock.patch.object(block, "get_fp8_context", lambda *_, **__: contextlib.nullcontext())


def _gradients_without_quantization(sections: dict[str, Any]) -> Any:
    with _without_quantization():
        return gradients({}, sections, FP8, portable=False)


@pytest.mark.parametrize("recompute", RECOMPUTE.values(), ids=RECOMPUTE)
def test_branches_of_fp8(recompute: dict[str, Any], plain: tuple[dict, float, dict]) -> None:
    """Recomputation is Transformer Engine's there, and matrices behind recomputed norms keep their input."""
    found = run_with_transformer_engine(_gradients_without_quantization, 1, {"recompute": recompute})
    check_equal(joined(found), plain)


@pytest.fixture(scope="module")
def plain() -> tuple[dict, float, dict]:
    """What one rank of portable layers gives."""
    return joined(run_ranks(gradients, 1, {}, {}))


def _adapters_without_quantization(parallel: dict[str, Any], recompute: dict[str, Any], kind: str) -> Any:
    sections, adapter = {"recompute": recompute}, test_adapters.KINDS[kind]
    with _without_quantization():
        return test_adapters.gradients(parallel, sections, adapter, portable=False, switches=FP8)


@pytest.fixture(scope="module")
def adapted() -> dict[str, tuple[dict, float, dict]]:
    """What one rank of portable layers gives without FP8."""
    kinds = test_adapters.KINDS
    return {
        kind: joined(run_ranks(test_adapters.gradients, 1, {}, {}, kinds[kind])) for kind in ("lora", "dora")
    }


@pytest.mark.parametrize(
    ("ranks", "parallel", "recompute", "kind"),
    [
        (1, {}, "none", "dora"),
        (1, {}, "full", "lora"),
        (1, {}, "selective", "lora"),
        (2, {"tensor": 2, "sequence": True}, "selective", "dora"),
        (2, {"pipeline": 2}, "full", "lora"),
        (4, {"tensor": 2, "sequence": True, "pipeline": 2}, "none", "lora"),
    ],
)
def test_adapters_beside_a_base_in_fp8(
    ranks: int,
    parallel: dict[str, Any],
    recompute: str,
    kind: str,
    adapted: dict[str, tuple[dict, float, dict]],
) -> None:
    """Loss and every trained gradient, with megatron-core's and Transformer Engine's branches for FP8."""
    arguments = (parallel, RECOMPUTE[recompute], kind)
    found = run_with_transformer_engine(_adapters_without_quantization, ranks, *arguments)
    check_equal(joined(found), adapted[kind])
