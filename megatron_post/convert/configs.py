"""The files beside the weights in a Hugging Face directory."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_post.config.sections import Model
from megatron_post.convert.contained import contained_file
from megatron_post.convert.hf_config import from_hf_config, to_hf_config
from megatron_post.convert.source import Kind
from megatron_post.data.tokenizer import Tokenizer
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.reading import read_object, reading

CONFIG = "config.json"
# The names of all tensors are made from the config before any tensor is read. A config with an absurd number
# of layers would exhaust the memory there. No published Llama has more than an eighth of this number.
_MOST_LAYERS = 1000


def read_model(directory: Path) -> Model:
    """The Llama that a directory's `config.json` describes. Nothing in the file is trusted.

    Raises `ValueError` with the file for a link that leads out of the directory, for a file that is not the
    config of a supported Llama, and for sizes that contradict each other.
    """
    path = directory / CONFIG
    if os.path.lexists(path):
        contained_file(directory, CONFIG, named_by=directory)
    with reading(path, "the config of a Llama"):
        model = from_hf_config(directory)
    values = read_object(path, "the config of a Llama")
    check_sizes(model, origin=path)
    for key, only in (("hidden_act", "silu"), ("head_dim", model.head_dim), ("partial_rotary_factor", 1.0)):
        if values.get(key) not in (None, only):
            raise ValueError(f"{path}: {key}={values[key]!r}; for this model only {only!r} is supported")
    return model


def check_sizes(model: Model, *, origin: Path) -> None:
    """Raises `ValueError` for sizes that no Llama has. origin: the file that the sizes come from."""
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    if model.hidden_size % heads or heads % groups:
        raise ValueError(
            f"{origin}: {heads} attention heads of {groups} query groups do not divide {model.hidden_size}"
        )
    if model.num_layers > _MOST_LAYERS:
        raise ValueError(f"{origin}: {model.num_layers} layers; at most {_MOST_LAYERS} are supported")


def written_configs(
    model: Model,
    tokenizer: Tokenizer | None,
    *,
    dtype: torch.dtype,
    scalar_head: bool,
    scores_steps: bool = False,
) -> dict[str, bytes]:
    """`config.json`, `generation_config.json` and the tokenizer's files, by name.

    Plain `transformers` loads a directory with these files.
    """
    bos_id, pad_id, eos_ids = None, None, []
    files: dict[str, bytes] = {}
    if tokenizer is not None:
        bos_id, pad_id, eos_ids = tokenizer.bos_id, tokenizer.pad_id, tokenizer.stop_ids
        with tempfile.TemporaryDirectory() as directory:
            tokenizer.save(directory)
            files = {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}
    config = to_hf_config(
        model,
        dtype=dtype_name(dtype),
        bos_id=bos_id,
        eos_ids=eos_ids,
        pad_id=pad_id,
        scalar_head=scalar_head,
        scores_steps=scores_steps,
    )
    generation = {"bos_token_id": bos_id, "eos_token_id": eos_ids, "pad_token_id": pad_id}
    return {"config.json": _json(config), "generation_config.json": _json(generation), **files}


def with_dtype(companions: dict[str, bytes], dtype: torch.dtype) -> dict[str, bytes]:
    """The same files, where `config.json` names another dtype."""
    config = json.loads(companions["config.json"])
    names = [name for name in ("torch_dtype", "dtype") if name in config] or ["torch_dtype"]
    return companions | {"config.json": _json(config | dict.fromkeys(names, dtype_name(dtype)))}


def fingerprint_of(companions: dict[str, bytes]) -> str:
    """A hash that changes when the name or the content of a file changes."""
    digests = [[name, hashlib.sha256(content).hexdigest()] for name, content in sorted(companions.items())]
    return sha256_of_json(digests)


def index_of(weight_map: dict[str, str], kinds: Mapping[str, Kind]) -> bytes:
    """`model.safetensors.index.json` as `save_pretrained` of transformers 5 writes it."""
    metadata = {
        "total_parameters": sum(prod(kind.shape) for kind in kinds.values()),
        "total_size": sum(kind.nbytes for kind in kinds.values()),
    }
    return _json({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def dtype_name(dtype: torch.dtype) -> str:
    """The name that configs use, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
