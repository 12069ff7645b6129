"""Converts Hugging Face's `config.json` of a Llama to a `Model`, and back."""

from pathlib import Path
from typing import Any

from megatron_post.config.hf_shape import SAME_NAMES, shape_of
from megatron_post.config.sections import Model


def to_hf_config(
    model: Model,
    *,
    dtype: str,
    bos_id: int | None,
    eos_ids: list[int],
    pad_id: int | None,
    scalar_head: bool = False,
    scores_steps: bool = False,
) -> dict[str, Any]:
    """The `config.json` with which plain `transformers` builds the same model.

    dtype: "bfloat16" or "float32". scores_steps: whether the scalar head scores steps.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        rope = {"rope_type": "llama3", **model.rope_scaling.model_dump()}
    classification = "LlamaForTokenClassification" if scores_steps else "LlamaForSequenceClassification"
    return {
        "architectures": [classification if scalar_head else "LlamaForCausalLM"],
        **({"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}} if scalar_head else {}),
        # transformers trains a token classification with a dropout of 0.1 unless its config says otherwise.
        **({"classifier_dropout": 0.0} if scores_steps else {}),
        "model_type": "llama",
        **{name: getattr(model, name) for name in SAME_NAMES},
        "num_hidden_layers": model.num_layers,
        "intermediate_size": model.ffn_hidden_size,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.initializer_range,
        # transformers 5 reads `rope_parameters`. Earlier releases read `rope_theta` and `rope_scaling`.
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
    """The `Model` that a Hugging Face directory describes. Raises `ValueError` as `shape_of` does."""
    return Model(**shape_of(directory))


def differences(of_config: Model, of_weights: Model) -> list[str]:
    """The keys in which two models differ as functions of their weights, one line for each key."""
    ignored = {"preset", "init_from", "initializer_range", "max_position_embeddings"}
    a, b = of_config.model_dump(exclude=ignored), of_weights.model_dump(exclude=ignored)
    return [f"model.{key}: {a[key]} in the config, {b[key]} in the weights" for key in a if a[key] != b[key]]
