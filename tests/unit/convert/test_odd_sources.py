"""Hugging Face directories that have a value or tensor twice. If the two differ, the error names both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_post.convert.configs import read_model
from megatron_post.convert.hf_config import to_hf_config
from megatron_post.convert.hf_directory import HuggingFaceDirectory
from megatron_post.convert.plan import plan
from megatron_post.convert.verify import compare_models
from tests.unit.convert.models import shaped_like, to_hf, to_megatron, weights_of, write_hf

TIED, UNTIED = shaped_like("8b", tied=True), shaped_like("8b")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_ABSENT = object()


@pytest.mark.parametrize("shards", [1, 3])
def test_a_tied_model_may_store_an_equal_head(tmp_path: Path, shards: int) -> None:
    """The round trip leaves the head out, as `transformers` writes tied models. All other tensors stay."""
    tensors = weights_of(TIED)
    whole = write_hf(tmp_path / "a", TIED, tensors | {HEAD: tensors[EMBEDDING].clone()}, shards=shards)
    source = HuggingFaceDirectory(whole)
    assert list(source.tensors) == list(tensors)
    plan(str(whole), dtype="fp32", max_shard_bytes=10**9, workers=1, megabytes_per_second=1.0)
    assert torch.equal(source.read(EMBEDDING, None, 0, 0), tensors[EMBEDDING])
    back = to_hf(to_megatron(whole, tmp_path / "checkpoints"), tmp_path / "back")
    assert load_file(back / "model.safetensors").keys() == tensors.keys()
    compare_models(str(whole), str(back), report=print)


def _changed(tensors: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    head = tensors[EMBEDDING].clone()
    head[row, -1] = torch.nextafter(head[row, -1], torch.tensor(9.0))
    return tensors | {HEAD: head}


@pytest.mark.parametrize("row", [0, 100, 252])
def test_another_head_than_the_tied_one_is_refused(tmp_path: Path, row: int) -> None:
    """The head differs in the last bit of one value. The error names it, and the key that decides."""
    directory = write_hf(tmp_path / "a", TIED, _changed(weights_of(TIED), row))
    with pytest.raises(
        ValueError, match=rf"model.safetensors: {HEAD} is not {EMBEDDING} .*=true; set it to false"
    ):
        HuggingFaceDirectory(directory)
    directory = write_hf(tmp_path / "b", UNTIED, _changed(weights_of(UNTIED), row))
    assert HEAD in HuggingFaceDirectory(directory).tensors  # a head that is not tied may have any values


@pytest.mark.parametrize(
    "head", [torch.zeros(254, 64), torch.zeros(253, 64, dtype=torch.bfloat16), torch.zeros(1)]
)
def test_a_tied_head_of_another_kind_is_refused(tmp_path: Path, head: Tensor) -> None:
    directory = write_hf(tmp_path / "a", TIED, weights_of(TIED) | {HEAD: head})
    with pytest.raises(
        ValueError, match=rf"{HEAD} is not {EMBEDDING} \({head.dtype} .* and not torch.float32"
    ):
        HuggingFaceDirectory(directory)


def test_rotary_buffers_are_computed_and_not_read(tmp_path: Path) -> None:
    """Earlier releases of `transformers` saved them in every layer, and later releases once for the model."""
    tensors = weights_of(UNTIED)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)]
    buffers = {name: torch.rand(1) for name in [*names, "model.rotary_emb.inv_freq"]}
    directory = write_hf(tmp_path / "a", UNTIED, tensors | buffers, shards=2)
    assert list(HuggingFaceDirectory(directory).tensors) == list(tensors)
    plan(str(directory), dtype="fp32", max_shard_bytes=10**9, workers=1, megabytes_per_second=1.0)
    compare_models(str(directory), str(to_megatron(directory, tmp_path / "checkpoints")), report=print)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq2",
        "model.layers.x.self_attn.rotary_emb.inv_freq",
        "model.layers.0.rotary_emb.inv_freq",
        "model.layers.0.self_attn.q_norm.weight",
        "score.bias",
    ],
)
def test_other_names_are_still_refused(tmp_path: Path, name: str) -> None:
    directory = write_hf(tmp_path / "a", UNTIED, weights_of(UNTIED) | {name: torch.rand(1)})
    with pytest.raises(ValueError, match=f"no such Llama has, the first is {name}"):
        HuggingFaceDirectory(directory)


def test_a_model_without_the_prefix_is_named(tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in weights_of(TIED).items()}
    with pytest.raises(ValueError, match=r"lack the prefix `model\.`, as in a LlamaModel"):
        HuggingFaceDirectory(write_hf(tmp_path / "a", TIED, bare))


def _config(directory: Path, **values: Any) -> Path:
    """Write a config in which keys are replaced or removed."""
    config = to_hf_config(UNTIED, dtype="float32", bos_id=1, eos_ids=[2], pad_id=None) | values
    (directory / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not _ABSENT})
    )
    return directory


AGREEING: dict[str, dict[str, Any]] = {
    "both": {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 500000, **LLAMA3}},
    "transformers 5": {
        "rope_theta": _ABSENT, "rope_scaling": _ABSENT, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}
    },
    "transformers 4": {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": _ABSENT},
    "null": {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": None},
    "theta apart": {"rope_theta": 5e5, "rope_scaling": _ABSENT, "rope_parameters": LLAMA3},
    "theta in the scaling": {
        "rope_theta": _ABSENT, "rope_scaling": {"rope_theta": 5e5, **LLAMA3}, "rope_parameters": None
    },
    "the older name of the type": {
        "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}, "rope_parameters": _ABSENT
    },
}  # fmt: skip


@pytest.mark.parametrize("name", AGREEING)
def test_one_rope_in_every_spelling(tmp_path: Path, name: str) -> None:
    model = read_model(_config(tmp_path, **AGREEING[name]))
    assert model.rope_theta == 5e5 and model.rope_scaling is not None
    assert model.rope_scaling.model_dump() == {
        key: value for key, value in LLAMA3.items() if key != "rope_type"
    }


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "theta": ({"rope_theta": 1e4}, r"rope_theta=10000.0 and rope_parameters.rope_theta=1000.0 contradict"),
    "theta in the scaling": (
        {"rope_scaling": {"rope_theta": 7.0, "rope_type": "default"}},
        r"rope_parameters.rope_theta=1000.0 and rope_scaling.rope_theta=7.0 contradict",
    ),
    "scaled in one": (
        {"rope_scaling": LLAMA3},
        r"rope_parameters=\{'rope_type': 'default'\} and rope_scaling=\{'rope_type': 'llama3', 'factor': 8.0",
    ),
    "scaled in the other": (
        {"rope_parameters": {"rope_theta": 1e3, **LLAMA3}},
        r"rope_parameters=\{'rope_type': 'llama3'.* and rope_scaling=\{'rope_type': 'default'\} contradict",
    ),
    "another factor": (
        {"rope_parameters": {"rope_theta": 1e3, **LLAMA3}, "rope_scaling": LLAMA3 | {"factor": 32.0}},
        r".*'factor': 8.0.* and .*'factor': 32.0.* contradict",
    ),
    "two types": (
        {"rope_scaling": {"rope_type": "llama3", "type": "default"}},
        r"rope_scaling.rope_type='llama3' and rope_scaling.type='default' contradict",
    ),
    "half of a scaling": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None},
        r"rope_scaling: rope_type='llama3' needs low_freq_factor, high_freq_factor, original_max",
    ),
    "a factor without a type": (
        {"rope_scaling": {"factor": 8.0}, "rope_parameters": None},
        r"rope_scaling.factor=8.0 has no meaning with rope_type='default'",
    ),
    "no object": ({"rope_parameters": [1]}, r"rope_parameters=\[1\] is not an object"),
    "by kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e3}}},
        r"rope_parameters.full_attention=.* has no meaning",
    ),
    "dtypes": ({"dtype": "bfloat16"}, r"dtype='bfloat16' and torch_dtype='float32' contradict"),
    "width of heads": ({"head_dim": 4}, r"head_dim=4; for this model only 2 is supported"),
    "part of the rotation": ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5; .* only 1.0"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config is set"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_named(tmp_path: Path, name: str) -> None:
    values, message = CONTRADICTIONS[name]
    with pytest.raises(ValueError, match=rf"{tmp_path / 'config.json'}: {message}"):
        read_model(_config(tmp_path, **values))


def test_the_same_dtype_twice(tmp_path: Path) -> None:
    read_model(_config(tmp_path, dtype="float32", torch_dtype="torch.float32"))
