"""A tiny config and packs of unequal segments, for the tests of layouts and parity."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_post.config.load import validate
from megatron_post.config.schema import Config
from megatron_post.data.pack import Pack
from megatron_post.data.template import TokenRole

# Tensor parallelism must pad a vocabulary of 250 ids. The model has grouped-query attention, and a RoPE
# scaling whose three bands (kept, interpolated and stretched) all occur within 64 positions.
MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 250,
    "max_position_embeddings": 256,
    "rope_theta": 1000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
PACK_LENGTH = 128


def tiny_config(run_dir: str | Path = "unused", *, stage: str = "sft", **sections: dict[str, Any]) -> Config:
    """The tiny config with replaced keys of its sections, such as `tiny_config(parallel={"tensor": 2})`."""
    values: dict[str, Any] = {
        "stage": stage,
        "run_dir": str(run_dir),
        "model": MODEL,
        "tokenizer": {"path": "unused"},
        "data": {"store": "unused", "pack_length": PACK_LENGTH},
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
        "train": {"steps": 4, "global_batch": 4},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return validate(values, origin="tiny")


def switched(config: Config, switches: dict[str, Any]) -> Config:
    """The config with replaced dotted keys, without a check.

    So a test can use a switch that is not allowed with fp32 on a GPU.
    """
    for key, value in switches.items():
        section, name = key.split(".")
        changed = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: changed})
    return config


def tiny_packs(count: int = 4, *, seed: int = 0, vocab_size: int = 250) -> list[Pack]:
    """Packs of 3 to 5 segments, each with prompt, body, terminator and padding.

    Segments have unequal lengths, which are multiples of 4.
    """
    rng = np.random.default_rng(seed)
    packs = []
    for _ in range(count):
        cuts = np.sort(rng.choice(np.arange(1, PACK_LENGTH // 4), size=rng.integers(2, 5), replace=False)) * 4
        cu_seqlens = np.array([0, *cuts, PACK_LENGTH], dtype=np.int32)
        roles = np.empty(PACK_LENGTH, dtype=np.uint8)
        for start, end in pairwise(cu_seqlens):
            roles[start:end] = _segment_roles(end - start, rng)
        roles[cu_seqlens[-2] :] = TokenRole.PADDING  # the tail
        segments = len(cu_seqlens) - 1
        packs.append(
            Pack(
                tokens=rng.integers(0, vocab_size, PACK_LENGTH).astype(np.int32),
                roles=roles,
                cu_seqlens=cu_seqlens,
                lengths=np.add.reduceat((roles != TokenRole.PADDING).astype(np.int32), cu_seqlens[:-1]),
                sources=np.zeros(segments, np.int32),
                sample_ids=np.arange(segments, dtype=np.uint64),
                unit_ids=np.arange(segments),
                ranks=np.full(segments, -1, np.int32),
            )
        )
    return packs


def _segment_roles(length: int, rng: np.random.Generator) -> np.ndarray:
    roles = np.full(length, TokenRole.BODY)
    prompt = int(rng.integers(1, length - 1))
    roles[0], roles[1:prompt] = TokenRole.HEADER, TokenRole.PROMPT
    roles[-2 if length > 4 else -1] = TokenRole.TERMINATOR
    if length > 4:
        roles[-1] = TokenRole.PADDING
    return roles
