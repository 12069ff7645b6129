"""Weights from a Hugging Face directory or from a seed, each rank reading only its slices."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_post.config.schema import Model
from megatron_post.convert.mapping import SCORE, hf_shapes, rule_for, shard_from_hf
from megatron_post.models.hf_config import differences, from_hf_config
from megatron_post.models.llama import Llama


class WeightSource(Protocol):
    """Anything that has the tensors of a Hugging Face Llama."""

    def read(self, name: str, dim: int | None, start: int, end: int) -> Tensor:
        """Rows or columns [start, end) along `dim`, or the whole tensor where dim is None."""


class RandomWeights:
    """Fresh weights, the same in every layout: each tensor is drawn whole from (seed, name) and then cut.

    Normal with `initializer_range`; output projections are scaled by 1 / sqrt(2 layers) as GPT-2 and Megatron
    do.
    """

    def __init__(self, model: Model, *, seed: int, scalar_head: bool = False) -> None:
        self._model, self._seed = model, seed
        self._shapes = hf_shapes(model, scalar_head=scalar_head)

    def read(self, name: str, dim: int | None, start: int, end: int) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
        std = self._model.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * self._model.num_layers) ** 0.5
        whole = torch.randn(shape, generator=generator) * std
        return whole if dim is None else whole.narrow(dim, start, end - start)


class SafetensorsDirectory:
    """A Hugging Face directory of safetensors, sharded or not. Tensors are read slice by slice from the
    files."""

    def __init__(self, directory: str | Path, model: Model, *, head: RandomWeights | None = None) -> None:
        """head: for a reward model, where its score comes from if the directory holds a language model.

        Raises `ValueError` where the directory is not this model: names, shapes and config are compared.
        """
        self._directory = Path(directory)
        mismatches = differences(model, from_hf_config(self._directory))
        if mismatches:
            raise ValueError(f"{directory} is another model:\n  " + "\n  ".join(mismatches))
        self._files, self._head = self._locate(), head
        shapes = hf_shapes(model, scalar_head=head is not None)
        if head is not None and SCORE[0] not in self._files:
            del shapes[SCORE[0]]
        self._check(shapes)

    def read(self, name: str, dim: int | None, start: int, end: int) -> Tensor:
        if self._head is not None and name not in self._files:
            return self._head.read(name, dim, start, end)
        with _open(self._directory / self._files[name]) as file:
            if dim is None:
                return file.get_tensor(name)
            view = file.get_slice(name)
            return view[start:end] if dim == 0 else view[:, start:end]

    def _locate(self) -> dict[str, str]:
        index, single = (
            self._directory / "model.safetensors.index.json",
            self._directory / "model.safetensors",
        )
        if index.is_file():
            files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            outside = sorted({f for f in files.values() if Path(f).name != f})
            if outside:
                raise ValueError(f"{index}: file name {outside[0]!r} points outside the directory")
            return files
        if single.is_file():
            with _open(single) as file:
                return dict.fromkeys(file.keys(), single.name)
        if list(self._directory.glob("*.bin")):
            raise ValueError(f"{self._directory} holds pickled .bin weights; save them as safetensors first")
        raise ValueError(
            f"{self._directory} holds neither model.safetensors nor model.safetensors.index.json"
        )

    def _check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        missing = sorted(set(shapes) - set(self._files))
        if missing:
            raise ValueError(
                f"{self._directory}: {len(missing)} tensor(s) missing, the first is {missing[0]}"
            )
        for file_name in sorted({self._files[name] for name in shapes}):
            path = self._directory / file_name
            with _open(path) as file:
                present = set(file.keys())
                for name in (n for n in shapes if self._files[n] == file_name):
                    if name not in present:
                        raise ValueError(f"{path}: tensor {name} is in the index and not in the file")
                    found = tuple(file.get_slice(name).get_shape())
                    if found != shapes[name]:
                        raise ValueError(f"{path}: {name} has shape {found}, expected {shapes[name]}")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def open_weights(model: Model, *, seed: int, scalar_head: bool = False) -> WeightSource:
    """`model.init_from` if it is set, else fresh weights from the seed.

    scalar_head: of a reward model; a language model's directory serves as well, with a small fresh score.
    """
    fresh = RandomWeights(model, seed=seed, scalar_head=scalar_head)
    if model.init_from is None:
        return fresh
    return SafetensorsDirectory(model.init_from, model, head=fresh if scalar_head else None)


@torch.no_grad()
def load_weights(chunks: list[Llama], source: WeightSource, model: Model) -> None:
    """Fill this rank's parameters from a source. Values are cast to the parameters' dtype."""
    for chunk in chunks:
        group = chunk.pg_collection.tp
        for name, parameter in chunk.named_parameters():
            rule, names = rule_for(name, layer_offset=layer_offset(chunk), scalar_head=chunk.scalar_head)
            # a last pipeline stage with tied embeddings holds its own copy of them, named as the output layer
            if model.tie_word_embeddings and rule.layout == "vocabulary":
                names = ("model.embed_tokens.weight",)
            shard = shard_from_hf(
                rule,
                names,
                source.read,
                model,
                rank=group.rank(),
                size=group.size(),
                padded_vocab=chunk.vocab_size,
            )
            parameter.copy_(shard)


def layer_offset(chunk: Llama) -> int:
    """Number in the model of the chunk's first layer."""
    return get_transformer_layer_offset(
        chunk.config, vp_stage=chunk.vp_stage, pp_rank=chunk.pg_collection.pp.rank()
    )
