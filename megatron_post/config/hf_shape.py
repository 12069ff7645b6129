"""The shape of a Llama in Hugging Face's `config.json`, as the keys of section `model`."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_post.storage.reading import read_object

SAME_NAMES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def shape_of(directory: Path) -> dict[str, Any]:
    """The keys of section `model` that a Hugging Face directory describes.

    Raises `ValueError` for another architecture, biases, quantized weights, an unknown RoPE type, a missing
    key, and keys that contradict each other.
    """
    path = directory / "config.json"
    if not os.path.lexists(path):
        raise ValueError(f"{path} does not exist: {directory} is not a Hugging Face model directory")
    values = read_object(path, "the config of a Llama")
    if values.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type={values.get('model_type')!r}; only llama is supported")
    if values.get("attention_bias") or values.get("mlp_bias"):
        raise ValueError(f"{path}: a Llama with biases is not supported")
    if values.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config is set: quantized weights cannot be used")
    dtypes = {key: values[key] for key in ("dtype", "torch_dtype") if values.get(key) is not None}
    _check_agree(path, {key: str(value).removeprefix("torch.") for key, value in dtypes.items()})
    theta, scaling = _rope(path, values)
    missing = [n for n in (*SAME_NAMES[:4], "num_hidden_layers", "intermediate_size") if n not in values]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    return {
        "tie_word_embeddings": False,
        **{name: values[name] for name in SAME_NAMES if name in values},
        "num_layers": values["num_hidden_layers"],
        "ffn_hidden_size": values["intermediate_size"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "initializer_range": values.get("initializer_range", 0.02),
    }


def _rope(path: Path, values: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Theta, and Llama 3's scaling or None.

    transformers 5 keeps both in `rope_parameters`. Earlier releases keep them in `rope_theta` and
    `rope_scaling`. A file may have all of these keys. Each release reads its own keys, so they must agree.
    """
    places = {} if values.get("rope_parameters") is None else {"rope_parameters": values["rope_parameters"]}
    if "rope_scaling" in values:  # null means that RoPE is not scaled
        places["rope_scaling"] = values["rope_scaling"] or {}
    thetas: dict[str, Any] = {"rope_theta": values.get("rope_theta")}
    scalings: dict[str, dict[str, Any]] = {}
    for key, place in places.items():
        if not isinstance(place, dict):
            raise ValueError(f"{path}: {key}={place!r} is not an object")
        thetas[f"{key}.rope_theta"] = place.get("rope_theta")
        scalings[key] = _scaling(path, key, place)
    thetas = {key: theta for key, theta in thetas.items() if theta is not None}
    _check_agree(path, thetas)
    _check_agree(path, scalings)
    scaling = next(iter(scalings.values()), {"rope_type": "default"})
    chosen = {name: scaling[name] for name in _SCALING} if scaling["rope_type"] == "llama3" else None
    return next(iter(thetas.values()), 10000.0), chosen


def _scaling(path: Path, key: str, place: dict[str, Any]) -> dict[str, Any]:
    """`rope_type` and the values that belong to it.

    Raises `ValueError` for any other key except theta.
    """
    kinds = {f"{key}.{name}": place[name] for name in ("rope_type", "type") if place.get(name) is not None}
    _check_agree(path, kinds)
    kind = next(iter(kinds.values()), "default")
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path}: {key}: rope_type={kind!r}; only default and llama3 are supported")
    scaling = {name: place.get(name) for name in _SCALING} if kind == "llama3" else {}
    if missing := [name for name, value in scaling.items() if value is None]:
        raise ValueError(f"{path}: {key}: rope_type='llama3' needs {', '.join(missing)}")
    known = {"rope_type", "type", "rope_theta", *scaling}
    for name, value in place.items():
        if name not in known and value is not None and (name, value) != ("partial_rotary_factor", 1):
            raise ValueError(
                f"{path}: {key}.{name}={value!r} has no meaning with rope_type={kind!r}; remove it"
            )
    return {"rope_type": kind, **scaling}


def _check_agree(path: Path, found: dict[str, Any]) -> None:
    """Raises `ValueError` with two keys whose values differ. found: the same setting under several keys."""
    for (first, a), (second, b) in pairwise(found.items()):
        if a != b:
            raise ValueError(
                f"{path}: {first}={a!r} and {second}={b!r} contradict each other; remove the wrong one"
            )
