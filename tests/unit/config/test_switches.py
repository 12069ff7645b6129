"""Performance switches are refused when the config is loaded or planned, and not on the nodes."""

from typing import Any

import pytest

from megatron_post.config.layout import world_errors
from megatron_post.config.load import ConfigError
from tests.tiny import tiny_config

BF16 = {"precision": {"dtype": "bf16"}}
# switch -> sections of a config in which it works
OF_TRANSFORMER_ENGINE: dict[str, dict[str, Any]] = {
    "optimizer.gradient_accumulation_fusion=true": {"optimizer": {"gradient_accumulation_fusion": True}},
}


def test_gather_beside_the_update() -> None:
    """megatron-core makes two optimizers of the first chunk and the others, and leaves the gather to them."""
    key = "overlap_param_gather_with_optimizer_step"
    interleaved = {"pipeline": 2, "virtual_pipeline": 2}
    tiny_config(parallel=interleaved, optimizer={"overlap": True, key: True})
    for parallel, overlap, missing in (
        (interleaved, False, "optimizer.overlap=true"),
        ({"pipeline": 2}, True, "parallel.virtual_pipeline > 1, not 1"),
    ):
        with pytest.raises(ConfigError) as caught:
            tiny_config(parallel=parallel, optimizer={"overlap": overlap, key: True})
        assert f"optimizer.{key}=true needs {missing}; set optimizer.{key}=false" in str(caught.value)


@pytest.mark.parametrize("switch", OF_TRANSFORMER_ENGINE)
def test_layers_of_transformer_engine(switch: str) -> None:
    """On a GPU without it, without a GPU, in fp32 and in rows that share a prompt the portable layers run."""
    sections = OF_TRANSFORMER_ENGINE[switch] | BF16
    config = tiny_config(**sections)
    assert world_errors(config, world_size=4, has_gpu=True, has_transformer_engine=True) == []
    for has_gpu, missing in ((False, "a GPU"), (True, "Transformer Engine (install it")):
        (error,) = world_errors(config, world_size=4, has_gpu=has_gpu, has_transformer_engine=False)
        assert error.startswith(f"{switch} needs {missing}") and "; set " in error
    for changes, reason in (
        ({"precision": {"dtype": "fp32"}}, "precision.dtype=fp32 runs the portable ones"),
        ({"stage": "reward"}, "reward.layout=isolated runs the portable ones"),
    ):
        with pytest.raises(ConfigError) as caught:
            tiny_config(**sections | changes)
        assert f"{switch} needs Transformer Engine's layers" in str(caught.value)
        assert reason in str(caught.value)
