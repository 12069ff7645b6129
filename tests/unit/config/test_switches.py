"""Performance switches are refused when the config is loaded or planned, and not on the nodes."""

from typing import Any

import pytest
import yaml

from megatron_post.config.layout import world_errors
from megatron_post.config.load import ConfigError
from tests.tiny import tiny_config

BF16 = {"precision": {"dtype": "bf16"}}
# switch -> sections of a config in which it works
OF_TRANSFORMER_ENGINE: dict[str, dict[str, Any]] = {
    "optimizer.gradient_accumulation_fusion=true": {"optimizer": {"gradient_accumulation_fusion": True}},
    "parallel.tp_comm_overlap=true": {
        "parallel": {"tensor": 2, "sequence": True, "tp_comm_overlap": True},
    },
    "parallel.cp_comm_type=a2a": {"parallel": {"context": 2, "cp_comm_type": "a2a"}},
}
FP8_WEIGHTS = {
    "precision": {"dtype": "bf16", "fp8": "tensorwise", "fp8_param_gather": True},
    "data": {"pack_length": 128},
}


def test_user_buffers() -> None:
    """Transformer Engine has no user buffers for blockwise FP8. For mxfp8 it needs multiples of 128 rows.

    megatron-core makes the buffers for sequence-parallel tokens.
    """
    parallel = {"tensor": 2, "sequence": True, "tp_comm_overlap": True}
    model = {"hidden_size": 512, "ffn_hidden_size": 512}
    for changes, precision, pack_length, expected in (
        ({"sequence": False}, {}, 512, "needs parallel.sequence=true"),
        ({}, {"fp8": "blockwise"}, 512, "has no buffers for precision.fp8=blockwise"),
        ({}, {"fp8": "mxfp8"}, 192, "set data.pack_length to a multiple of 256"),
        ({}, {"fp8": "mxfp8"}, 512, None),
        ({}, {"fp8": "tensorwise"}, 192, None),
    ):
        sections: dict[str, Any] = {
            "parallel": parallel | changes,
            "precision": {"dtype": "bf16", **precision},
            "data": {"pack_length": pack_length},
            "model": model,
        }
        if expected is None:
            tiny_config(**sections)
            continue
        with pytest.raises(ConfigError) as caught:
            tiny_config(**sections)
        assert expected in str(caught.value) and "parallel.tp_comm_overlap=false" in str(caught.value)


@pytest.mark.parametrize("kind", ["a2a+p2p", "all_gather"])
def test_context_parallelism_that_only_unpacked_rows_support(kind: str) -> None:
    """Transformer Engine asserts that rows are not packed.

    The assertions are in `attn_forward_func_with_cp` and `AttnFuncWithCPAndKVAllGather`.
    """
    with pytest.raises(ConfigError) as caught:
        tiny_config(parallel={"context": 2, "cp_comm_type": kind}, **BF16)
    assert f"parallel.cp_comm_type={kind} is not for packed rows" in str(caught.value)
    assert "set parallel.cp_comm_type=p2p or a2a" in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "remedies"),
    [
        ({"parallel": {"cp_comm_type": "all_gather"}}, ["parallel.cp_comm_type=p2p"]),
        ({"parallel": {"cp_comm_type": "all_gather", "context": 4}}, ["parallel.cp_comm_type=p2p"]),
        ({"parallel": {"tp_comm_overlap": True}}, ["parallel.tp_comm_overlap=false"]),
        (
            {"precision": {"fp8": "delayed"}, "recompute": {"mode": "selective", "modules": ["layernorm"]}},
            ["precision.fp8=tensorwise", "recompute.mode=none and recompute.modules=[core_attn]"],
        ),
    ],
    ids=str,
)
def test_a_remedy_leads_to_no_second_message(sections: dict[str, Any], remedies: list[str]) -> None:
    """Each remedy in the message alone makes the config load."""
    sections = {**BF16, **sections, "data": {"pack_length": 256}}
    sections["precision"] = {**BF16["precision"], **sections["precision"]}
    with pytest.raises(ConfigError, match=r"1 error\(s\)") as caught:
        tiny_config(**sections)
    (line,) = str(caught.value).splitlines()[1:]
    _, _, text = line.partition("; set ")
    assert text == ", or set ".join(remedies)
    for remedy in remedies:
        changed = {section: dict(values) for section, values in sections.items()}
        for setting in remedy.split(" and "):
            key, _, value = setting.partition("=")
            section, _, name = key.partition(".")
            changed[section][name] = yaml.safe_load(value)
        tiny_config(**changed)


def test_heads_over_context_parallel_ranks() -> None:
    """2 ranks can share 4 query heads and 2 key heads. 4 ranks cannot, nor 2 with tensor parallelism."""
    tiny_config(parallel={"context": 2, "cp_comm_type": "a2a"}, **BF16)
    for parallel, lines in (
        ({"context": 4}, ["model.num_key_value_heads=2 over parallel.tensor=1"]),
        (
            {"context": 4, "tensor": 2},
            ["model.num_attention_heads=4 over parallel.tensor=2", "model.num_key_value_heads=2 over"],
        ),
        ({"context": 1}, ["parallel.cp_comm_type=a2a needs parallel.context > 1, not 1"]),
    ):
        with pytest.raises(ConfigError) as caught:
            tiny_config(parallel=parallel | {"cp_comm_type": "a2a"}, **BF16)
        assert [line in str(caught.value) for line in lines] == [True] * len(lines)
        assert str(caught.value).count("parallel.cp_comm_type=a2a") == len(lines)


def test_transformer_engine_2_9_has_no_exchange_of_packed_heads() -> None:
    config = tiny_config(parallel={"context": 2, "cp_comm_type": "a2a"}, **BF16)
    known = {"world_size": 4, "has_gpu": True, "has_transformer_engine": True}
    assert [world_errors(config, transformer_engine=v, **known) for v in ("2.10.0", "2.11rc1", None)] == [
        []
    ] * 3
    (error,) = world_errors(config, transformer_engine="2.9.0", **known)
    assert error.startswith("parallel.cp_comm_type=a2a needs Transformer Engine 2.10 or newer")


def test_gather_beside_the_update() -> None:
    """megatron-core makes one optimizer for the first chunk and one for the others, and both gather."""
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
    """The portable layers run without Transformer Engine, without a GPU, and in fp32."""
    sections = OF_TRANSFORMER_ENGINE[switch] | BF16
    config = tiny_config(**sections)
    assert world_errors(config, world_size=4, has_gpu=True, has_transformer_engine=True) == []
    for has_gpu, missing in ((False, "a GPU"), (True, "Transformer Engine (install it")):
        (error,) = world_errors(config, world_size=4, has_gpu=has_gpu, has_transformer_engine=False)
        assert error.startswith(f"{switch} needs {missing}") and "; set " in error
    with pytest.raises(ConfigError) as caught:
        tiny_config(**sections | {"precision": {"dtype": "fp32"}})
    assert f"{switch} needs Transformer Engine's layers" in str(caught.value)
    assert "precision.dtype=fp32 runs the portable ones" in str(caught.value)


def test_rows_that_share_a_prompt() -> None:
    """These rows use Transformer Engine's linear layers and the portable attention."""
    for stage in ("reward", "dpo"):
        sections = {"stage": stage, stage: {"layout": "isolated"}, **BF16}
        tiny_config(**sections, optimizer={"gradient_accumulation_fusion": True})
        with pytest.raises(ConfigError) as caught:
            tiny_config(**sections, parallel={"context": 2, "cp_comm_type": "a2a"})
        assert (
            f"parallel.cp_comm_type=a2a needs Transformer Engine's attention, and {stage}.layout=isolated"
            in str(caught.value)
        )


@pytest.mark.parametrize("recipe", [None, "delayed", "blockwise", "mxfp8"])
def test_weights_in_fp8_have_one_scale_each(recipe: str | None) -> None:
    model = {"hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_config(model=model, **FP8_WEIGHTS)
    with pytest.raises(ConfigError) as caught:
        tiny_config(model=model, **FP8_WEIGHTS | {"precision": FP8_WEIGHTS["precision"] | {"fp8": recipe}})
    assert (
        f"precision.fp8_param_gather=true needs precision.fp8=tensorwise, not {recipe or 'null'}; set it, or "
        "precision.fp8_param_gather=false"
    ) in str(caught.value)


def test_weights_in_fp8_need_transformer_engine_2_10() -> None:
    config = tiny_config(model={"ffn_hidden_size": 128}, **FP8_WEIGHTS)
    known = {"world_size": 4, "has_gpu": True, "has_transformer_engine": True}
    assert world_errors(config, transformer_engine="2.10.0", **known) == []
    (error,) = world_errors(config, transformer_engine="2.9.0", **known)
    assert error.startswith("precision.fp8_param_gather=true needs Transformer Engine 2.10 or newer to ")
    assert "set precision.fp8_param_gather=false or install it" in error
    fp8, weights = world_errors(config, world_size=4, has_gpu=True, has_transformer_engine=False)
    assert "precision.fp8=tensorwise needs" in fp8 and "precision.fp8_param_gather=true needs" in weights
    with pytest.raises(ConfigError) as caught:
        tiny_config(**FP8_WEIGHTS | {"precision": FP8_WEIGHTS["precision"] | {"dtype": "fp32"}})
    assert "precision.fp8_param_gather=true needs Transformer Engine's layers" in str(caught.value)
