"""FP8 recipes are refused with settings, widths, GPUs and versions of CUDA that cannot run them."""

from typing import Any

import pytest

from megatron_post.config.fp8 import RECIPES, refusal
from megatron_post.config.layout import uses_portable_attention, uses_portable_layers, world_errors
from megatron_post.config.load import ConfigError
from megatron_post.config.schema import Config
from tests.tiny import tiny_config


def _config(recipe: str | None, **sections: Any) -> Config:
    return tiny_config(precision={"dtype": "bf16", "fp8": recipe}, **sections)


@pytest.mark.parametrize(
    ("recipe", "model", "tensor", "expected"),
    [
        # 4 heads of 18, and 4 x 18 + 2 x 2 x 18 = 144 = 9 x 16
        ("tensorwise", {"hidden_size": 72}, 1, "model.hidden_size=72 gives 72 with parallel.tensor=1"),
        ("delayed", {"ffn_hidden_size": 100}, 1, "ffn_hidden_size=100 gives 100 with"),
        # 96 = 3 x 32 = 6 x 16, but 48 on each of two ranks is 3 x 16 and not a multiple of 32
        (
            "mxfp8",
            {},
            2,
            "ffn_hidden_size=96 gives 48 with parallel.tensor=2; set precision.fp8=tensor",
        ),
        ("blockwise", {"hidden_size": 128, "ffn_hidden_size": 128}, 2, "hidden_size=128 gives 64"),
        # 8 heads of 8 and one group: 64 + 2 x 8 = 80 = 5 x 16
        (
            "mxfp8",
            {"num_attention_heads": 8, "num_key_value_heads": 1},
            1,
            "num_key_value_heads=1 (queries, keys and values together) gives 80",
        ),
    ],
)
def test_widths(recipe: str, model: dict[str, int], tensor: int, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        _config(recipe, model=model, parallel={"tensor": tensor}, data={"pack_length": 256})
    assert expected in str(error.value)
    assert f"multiples of {RECIPES[recipe].multiple}" in str(error.value)


def test_a_recipe_is_the_remedy_where_it_takes_all_widths() -> None:
    """80 and 144 are multiples of 16 and 100 is not, so tensorwise would not take all of them."""
    with pytest.raises(ConfigError) as error:
        _config("mxfp8", model={"hidden_size": 80, "ffn_hidden_size": 100, "num_attention_heads": 5})
    lines = [line for line in str(error.value).splitlines() if "needs matrices" in line]
    assert len(lines) == 3 and all(line.endswith("set precision.fp8=null") for line in lines)


def test_a_width_that_no_recipe_takes() -> None:
    """A lower parallel.tensor is not a remedy if the whole width is not a multiple either."""
    with pytest.raises(ConfigError) as error:
        _config("tensorwise", model={"ffn_hidden_size": 100}, parallel={"tensor": 2})
    (line,) = [line for line in str(error.value).splitlines() if "ffn" in line]
    assert line.endswith("gives 50 with parallel.tensor=2; set precision.fp8=null")


def test_widths_that_fit() -> None:
    """64, 64 + 2 x 2 x 16 = 128 and 96 are multiples of 32, and their halves are multiples of 16."""
    _config("mxfp8")
    _config("tensorwise", parallel={"tensor": 2})
    _config("delayed", recompute={"mode": "full"})
    for layout in ("separate", "isolated", "concatenated"):
        _config("tensorwise", stage="reward", reward={"layout": layout})


def test_delayed_scaling_recomputes_no_norms() -> None:
    values: dict[str, Any] = {"recompute": {"mode": "selective", "modules": ["mlp", "layernorm"]}}
    with pytest.raises(ConfigError, match=r"set precision.fp8=tensorwise, or set recompute.modules=\[mlp\]"):
        _config("delayed", **values)
    _config("tensorwise", **values)


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "expected"),
    [
        ("mxfp8", (9, 0), "13.0", "capability 10.0 or higher and below 12.0, and these have 9.0; set "
         "precision.fp8=tensorwise"),
        ("mxfp8", (12, 0), "13.0", "these have 12.0; set precision.fp8=tensorwise"),
        ("blockwise", (9, 0), "12.8", "needs CUDA 12.9 or newer, and this torch is built for 12.8; set "
         "precision.fp8=tensorwise"),
        ("delayed", (8, 0), "12.8", "capability 8.9 or higher, and these have 8.0; set precision.fp8=null"),
    ],
)  # fmt: skip
def test_devices(recipe: str, capability: tuple[int, int], cuda: str, expected: str) -> None:
    data = {"pack_length": 128}
    model = {"hidden_size": 128, "ffn_hidden_size": 128}
    (error,) = world_errors(
        _config(recipe, data=data, model=model),
        world_size=1,
        has_gpu=True,
        has_transformer_engine=True,
        capability=capability,
        cuda=cuda,
    )
    assert error.startswith(f"precision.fp8={recipe} needs ") and error.endswith(expected)


def test_what_is_not_known_is_not_refused() -> None:
    assert all(refusal(recipe, capability=None, cuda=None) is None for recipe in RECIPES)
    assert refusal("blockwise", capability=(9, 0), cuda=None) is None
    assert refusal("blockwise", capability=(10, 0), cuda="13.0") is None


def test_which_layers() -> None:
    """Transformer Engine has no fused attention for packed rows in fp32, as test_versions.py shows."""
    assert uses_portable_layers(tiny_config(), has_transformer_engine=True)
    assert not uses_portable_layers(_config(None), has_transformer_engine=True)
    assert uses_portable_layers(_config(None), has_transformer_engine=False)


def test_which_attention() -> None:
    """Rows that share a prompt use the portable attention inside Transformer Engine's layers."""
    for layout, portable in (("separate", False), ("isolated", True), ("concatenated", True)):
        config = _config("tensorwise", stage="reward", reward={"layout": layout})
        assert not uses_portable_layers(config, has_transformer_engine=True)
        assert uses_portable_attention(config, has_transformer_engine=True) == portable
        assert uses_portable_attention(config, has_transformer_engine=False)
    for layout, portable in (("separate", False), ("isolated", True)):
        pairs = _config("tensorwise", stage="dpo", dpo={"layout": layout})
        assert uses_portable_attention(pairs, has_transformer_engine=True) == portable
    assert uses_portable_attention(tiny_config(), has_transformer_engine=True)


def test_ranks_ask_their_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank checks its own GPU and CUDA, because only the node of a run knows them."""
    from megatron_post.train import inputs

    monkeypatch.setattr(inputs.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(inputs.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(inputs.torch.cuda, "get_device_capability", lambda device: {0: (9, 0)}[device])
    monkeypatch.setattr(inputs, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(inputs.torch.version, "cuda", "12.8")
    (error,) = inputs.rank_errors(_config("mxfp8"), world_size=1)
    assert "these have 9.0" in error
    assert inputs.rank_errors(_config("delayed"), world_size=1) == []
    # torchrun with more ranks than GPUs
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    (error,) = inputs.rank_errors(_config("delayed"), world_size=2)
    assert "local rank 1" in error and "sees 1 GPUs" in error
