"""Each version of Transformer Engine that megatron-core 0.16 is made for takes the keywords that we pass."""

from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import pytest

from megatron_post.config.layout import world_errors
from megatron_post.installation import VERSIONS
from tests.distributed.test_layouts import check_equal, gradients, joined
from tests.ranks import run_ranks
from tests.tiny import tiny_config
from tests.transformer_engine.ranks import VERSION, run_with_transformer_engine
from tests.transformer_engine.stand_in import WHEELS

OTHERS = ["2.9.0", "2.10.0"]
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP2 + SP, everything recomputed by itself": (
        2,
        {"tensor": 2, "sequence": True},
        {"recompute": {"mode": "selective", "modules": ["core_attn", "mlp", "layernorm"]}},
    ),
    "CP2, layers recomputed": (2, {"context": 2}, {"recompute": {"mode": "full"}}),
}


def test_no_version_is_forgotten() -> None:
    """`doctor` names the range."""
    fits = VERSIONS["transformer-engine"]
    assert fits.end is not None
    (major, first), (_, end) = fits.first, fits.end
    assert [*OTHERS, VERSION] == [f"{major}.{minor}.0" for minor in range(first, end)]


@pytest.fixture(scope="module")
def expected() -> tuple[dict, float, dict]:
    """What one rank of portable layers gives."""
    return joined(run_ranks(gradients, 1, {}, {}))


def _needs(version: str) -> None:
    if not (WHEELS / version).is_dir():
        pytest.skip(f"Transformer Engine's pure Python wheel is not in {WHEELS / version}: make install")


@pytest.mark.parametrize("version", OTHERS)
def test_older_versions(version: str, expected: tuple[dict, float, dict]) -> None:
    """Modules are made and called as with the newest, which the other tests have."""
    _needs(version)
    run = partial(gradients, portable=False)
    for world_size, parallel, sections in CASES.values():
        found = run_with_transformer_engine(run, world_size, parallel, sections, version=version)
        check_equal(joined(found), expected)


def _attention_over_packed_rows() -> dict[tuple[str, bool], bool]:
    """Whether there is a fused attention, by (number format, with context parallelism)."""
    import torch
    import transformer_engine.pytorch.attention.dot_product_attention.utils as te

    from tests.transformer_engine.stand_in import tex

    kinds = tex.NVTE_Fused_Attn_Backend
    found = {}
    for dtype, context in product((torch.float32, torch.bfloat16), (False, True)):
        rows = te.AttentionParams(
            qkv_type=torch.Tensor,
            qkv_dtype=dtype,
            qkv_layout="thd_thd_thd",
            attn_mask_type="padding_causal",
            context_parallel=context,
            is_training=True,
        )
        # as far as cuDNN is concerned, every kind of attention is there
        with (
            mock.patch.object(te, "get_device_compute_capability", lambda: (9, 0)),
            mock.patch.object(tex, "get_fused_attn_backend", lambda *_: kinds.NVTE_F16_arbitrary_seqlen),
        ):
            flash, _, fused, *_ = te.get_attention_backend(rows)
        found[str(dtype), context] = bool(flash or fused)
    return found


@pytest.mark.parametrize("version", [*OTHERS, VERSION])
def test_no_fused_attention_in_fp32(version: str) -> None:
    """Which is why a run in fp32 has the portable layers: `config.layout.uses_portable_layers`."""
    _needs(version)
    (found,) = run_with_transformer_engine(_attention_over_packed_rows, 1, version=version)
    assert found == {
        (f"torch.{name}", context): name == "bfloat16"
        for name, context in product(("float32", "bfloat16"), (False, True))
    }


def _widths_of_flash_attention() -> list[int]:
    """The widths of heads that Transformer Engine gives to FlashAttention 2, among even ones."""
    import torch
    import transformer_engine.pytorch.attention.dot_product_attention.utils as te

    te.FlashAttentionUtils.version = te.FlashAttentionUtils.max_version
    te.FlashAttentionUtils.set_flash_attention_version()
    found = []
    for width in range(2, 300, 2):
        rows = te.AttentionParams(
            qkv_type=torch.Tensor,
            qkv_dtype=torch.bfloat16,
            qkv_layout="thd_thd_thd",
            attn_mask_type="padding_causal",
            head_dim_qk=width,
            head_dim_v=width,
            core_attention_bias_shape=None,
            is_training=True,
        )
        with (
            mock.patch.object(te, "get_device_compute_capability", lambda: (9, 0)),
            mock.patch.object(torch.cuda, "current_device", lambda: 1),  # the first one prints an advice
        ):
            flash, *_ = te.get_attention_backend(rows)
        if flash:
            found.append(width)
    return found


@pytest.mark.parametrize("version", [*OTHERS, VERSION])
def test_widths_of_heads(version: str) -> None:
    """A GPU with Transformer Engine refuses the other widths: `config.layout.world_errors`."""
    _needs(version)
    (found,) = run_with_transformer_engine(_widths_of_flash_attention, 1, version=version)
    assert found == [width for width in range(2, 300, 2) if not _is_refused(width)]


def _is_refused(width: int) -> bool:
    model = {"hidden_size": 4 * width, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = tiny_config(model=model, precision={"dtype": "bf16"})
    return bool(world_errors(config, world_size=4, has_gpu=True, has_transformer_engine=True))
