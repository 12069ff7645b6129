"""Hugging Face's `config.json` of a Llama, to and from our `Model`."""

import os
from pathlib import Path
from typing import Any

from megatron_post.config.schema import Model
from megatron_post.storage.reading import read_object

_SAME_NAMES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def to_hf_config(
    model: Model,
    *,
    dtype: str,
    bos_id: int | None,
    eos_ids: list[int],
    pad_id: int | None,
    scalar_head: bool = False,
) -> dict[str, Any]:
    """The `config.json` with which plain `transformers` builds the same model. dtype: "bfloat16" or
    "float32"."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        rope = {"rope_type": "llama3", **model.rope_scaling.model_dump()}
    return {
        "architectures": ["LlamaForSequenceClassification" if scalar_head else "LlamaForCausalLM"],
        **({"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}} if scalar_head else {}),
        "model_type": "llama",
        **{name: getattr(model, name) for name in _SAME_NAMES},
        "num_hidden_layers": model.num_layers,
        "intermediate_size": model.ffn_hidden_size,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.initializer_range,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling is None else rope,
        "rope_parameters": {"rope_theta": model.rope_theta, **rope},
        "torch_dtype": dtype,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids,
        "pad_token_id": pad_id,
    }


def from_hf_config(directory: Path) -> Model:
    """The `Model` that a Hugging Face directory describes.

    Raises `ValueError` for another architecture, biases, an unknown RoPE type, or a missing key.
    """
    path = directory / "config.json"
    if not os.path.lexists(path):
        raise ValueError(f"{path} does not exist: {directory} is not a Hugging Face model directory")
    values = read_object(path, "the config of a Llama")
    if values.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type={values.get('model_type')!r}; only llama is supported")
    if values.get("attention_bias") or values.get("mlp_bias"):
        raise ValueError(f"{path}: a Llama with biases is not supported")
    # transformers 5 keeps theta and scaling together in rope_parameters, earlier releases apart
    rope = values.get("rope_parameters") or {}
    scaling = rope or values.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path}: rope_type={kind!r}; only default and llama3 are supported")
    missing = [n for n in (*_SAME_NAMES[:4], "num_hidden_layers", "intermediate_size") if n not in values]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    return Model(
        **{name: values[name] for name in _SAME_NAMES if name in values and name != "tie_word_embeddings"},
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        num_layers=values["num_hidden_layers"],
        ffn_hidden_size=values["intermediate_size"],
        rope_theta=rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        rope_scaling={name: scaling[name] for name in _SCALING} if kind == "llama3" else None,
        initializer_range=values.get("initializer_range", 0.02),
    )


def differences(ours: Model, theirs: Model) -> list[str]:
    """Where two models are not the same function of their weights, one line a key."""
    ignored = {"preset", "init_from", "initializer_range", "max_position_embeddings"}
    a, b = ours.model_dump(exclude=ignored), theirs.model_dump(exclude=ignored)
    return [f"model.{key}: {a[key]} in the config, {b[key]} in the weights" for key in a if a[key] != b[key]]
