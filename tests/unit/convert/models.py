"""Small models on disk, in the format of every source."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_post.config.sections import Model
from megatron_post.convert.hf_config import to_hf_config
from megatron_post.convert.hf_reader import RandomWeights
from megatron_post.convert.jobs import convert
from megatron_post.convert.mapping import hf_shapes
from megatron_post.convert.to_hf import ToHuggingFace
from megatron_post.convert.to_megatron import ToMegatron

# Numbers of heads and groups and the ratio of feed-forward to hidden size are those of the real models. A
# head is 2 wide, and the vocabulary is odd.
_HEADS = {"8b": (32, 3.5), "70b": (64, 3.5), "405b": (128, 3.25)}


def shaped_like(size: str, *, tied: bool = False) -> Model:
    """A model of 3 layers with the head and group counts of a Llama 3."""
    heads, ratio = _HEADS[size]
    return Model(
        num_layers=3,
        hidden_size=2 * heads,
        ffn_hidden_size=int(2 * heads * ratio),
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=253,
        max_position_embeddings=256,
        rope_theta=1000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )


def weights_of(
    model: Model,
    *,
    scalar_head: bool = False,
    scores_steps: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random tensors by Hugging Face's names. Norms are random too, so that swapped norms are noticed."""
    head = {"scalar_head": scalar_head, "scores_steps": scores_steps}
    source = RandomWeights(model, seed=7, **head)
    tensors = {name: source.read(name, None, 0, 0) for name in hf_shapes(model, **head)}
    torch.manual_seed(8)
    return {name: (t + 0.05 * torch.randn(t.shape)).to(dtype) for name, t in tensors.items()}


def write_hf(
    directory: Path,
    model: Model,
    tensors: dict[str, Tensor],
    *,
    shards: int = 1,
    scalar_head: bool = False,
    scores_steps: bool = False,
) -> Path:
    """Write a Hugging Face directory of these tensors with the `safetensors` library."""
    directory.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    values = to_hf_config(
        model,
        dtype=dtype,
        bos_id=1,
        eos_ids=[2],
        pad_id=None,
        scalar_head=scalar_head,
        scores_steps=scores_steps,
    )
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "tokenizer.json").write_text("a tokenizer")
    names = list(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in names[i::shards]}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def to_megatron(source: Path, root: Path, *, dtype: str | None = None, workers: int = 1) -> Path:
    """Convert with chunks and parts so small that every tensor has several of them."""
    job = ToMegatron(str(source), str(root), dtype, part_bytes=150_000, chunk_bytes=10_000)
    assert convert(job, workers=workers, report=print).is_complete
    return root


def to_hf(source: Path, directory: Path, *, max_shard_bytes: int = 5 * 10**9, workers: int = 1) -> Path:
    """Converted back."""
    job = ToHuggingFace(str(source), str(directory), max_shard_bytes=max_shard_bytes)
    assert convert(job, workers=workers, report=print).is_complete
    return directory
