"""The files beside the weights in a Hugging Face directory."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_post.config.schema import Model
from megatron_post.data.tokenizer import Tokenizer
from megatron_post.models.hf_config import to_hf_config


def written_configs(
    model: Model, tokenizer: Tokenizer | None, *, dtype: torch.dtype, scalar_head: bool
) -> dict[str, bytes]:
    """`config.json`, `generation_config.json` and the tokenizer's files, with which plain `transformers`
    loads."""
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
    )
    generation = {"bos_token_id": bos_id, "eos_token_id": eos_ids, "pad_token_id": pad_id}
    return {"config.json": _json(config), "generation_config.json": _json(generation), **files}


def with_dtype(companions: dict[str, bytes], dtype: torch.dtype) -> dict[str, bytes]:
    """The same files, with `config.json` naming another dtype."""
    config = json.loads(companions["config.json"])
    names = [name for name in ("torch_dtype", "dtype") if name in config] or ["torch_dtype"]
    return companions | {"config.json": _json(config | dict.fromkeys(names, dtype_name(dtype)))}


def fingerprint_of(companions: dict[str, bytes]) -> str:
    """Changes when a name or the content of a file does."""
    digests = [[name, hashlib.sha256(content).hexdigest()] for name, content in sorted(companions.items())]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def index_of(weight_map: dict[str, str], *, total_bytes: int) -> bytes:
    """`model.safetensors.index.json`."""
    return _json({"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))})


def dtype_name(dtype: torch.dtype) -> str:
    """As configs spell it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
