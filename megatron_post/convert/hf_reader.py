"""Weights from a Hugging Face directory or from a seed. Each rank reads only its own slices."""

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_post.config.sections import Model
from megatron_post.convert.configs import read_model
from megatron_post.convert.hf_config import differences
from megatron_post.convert.hf_directory import HuggingFaceDirectory
from megatron_post.convert.mapping import SCORE, SCORE_BIAS, hf_shapes, rule_for, shard_from_hf
from megatron_post.models.adapted import base_parameters
from megatron_post.models.llama import Llama
from megatron_post.storage.hub import model_directory


class WeightSource(Protocol):
    """Anything that has the tensors of a Hugging Face Llama."""

    def read(self, name: str, dim: int | None, start: int, end: int) -> Tensor:
        """Rows or columns [start, end) along `dim`, or the whole tensor if dim is None."""


class RandomWeights:
    """Random initial weights. They are identical in every layout of ranks.

    Each tensor is drawn whole from (seed, name), and each rank then takes its slice. Values are normal with
    `initializer_range`. Output projections are scaled by 1 / sqrt(2 layers), as in GPT-2 and Megatron. Norms
    are 1, and the bias of a score is 0.
    """

    def __init__(
        self, model: Model, *, seed: int, scalar_head: bool = False, scores_steps: bool = False
    ) -> None:
        self._model, self._seed = model, seed
        self._shapes = hf_shapes(model, scalar_head=scalar_head, scores_steps=scores_steps)

    def read(self, name: str, dim: int | None, start: int, end: int) -> Tensor:
        shape = self._shapes[name]
        if name == SCORE_BIAS[0]:
            return torch.zeros(shape)
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
    """A Hugging Face directory of safetensors as the weights of a config's model, read slice by slice."""

    def __init__(self, directory: str | Path, model: Model, *, head: RandomWeights | None = None) -> None:
        """head: the source of a reward model's score if the directory holds a language model.

        Raises `ValueError` if the directory holds another model. Names, shapes and config are compared.
        """
        path = model_directory(directory)
        if mismatches := differences(model, read_model(path)):
            raise ValueError(f"{directory} is another model:\n  " + "\n  ".join(mismatches))
        self._directory, self._head = HuggingFaceDirectory(path), head
        if self._directory.scalar_head and head is None:
            raise ValueError(f"{directory} is a reward model: it has {SCORE[0]} and no lm_head")

    @property
    def scores_steps(self) -> bool:
        """Whether the directory holds a reward model of steps."""
        return self._directory.scores_steps

    def read(self, name: str, dim: int | None, start: int, end: int) -> Tensor:
        if self._head is not None and name not in self._directory.tensors:
            return self._head.read(name, dim, start, end)
        return self._directory.read(name, dim, start, end)


def open_weights(
    model: Model, *, seed: int, scalar_head: bool = False, scores_steps: bool = False
) -> WeightSource:
    """The weights of `model.init_from` if it is set. Otherwise random weights from the seed.

    scalar_head: for a reward model. The directory may also hold a language model, to which a small random
    score is added. scores_steps: for one that scores steps. The directory may also hold a reward model of
    whole responses, to whose score a bias of 0 is added.
    """
    fresh = RandomWeights(model, seed=seed, scalar_head=scalar_head, scores_steps=scores_steps)
    if model.init_from is None:
        return fresh
    weights = SafetensorsDirectory(model.init_from, model, head=fresh if scalar_head else None)
    if weights.scores_steps and not scores_steps:
        raise ValueError(
            f"{model.init_from} is a reward model of steps: it has {SCORE_BIAS[0]}, and only "
            "stage=step_reward trains such a model"
        )
    return weights


@torch.no_grad()
def load_weights(chunks: list[Llama], source: WeightSource, model: Model) -> None:
    """Fill this rank's parameters, without those of adapters. Values are cast to the parameters' dtype."""
    for chunk in chunks:
        group = chunk.pg_collection.tp
        for name, parameter in base_parameters(chunk):
            rule, names = rule_for(name, layer_offset=layer_offset(chunk), scalar_head=chunk.scalar_head)
            # If embeddings are tied, the last pipeline stage holds a copy of them that is named as the output
            # layer.
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
            values = shard.to(parameter.dtype)
            parameter.copy_(values)
            if hasattr(parameter, "get_high_precision_init_val"):
                # The layer keeps this weight in FP8, rounded from bf16. The optimizer begins from the host's
                # copy of the values before they were rounded.
                parameter.get_high_precision_init_val().copy_(values)


def layer_offset(chunk: Llama) -> int:
    """The number, in the whole model, of the chunk's first layer."""
    return get_transformer_layer_offset(
        chunk.config, vp_stage=chunk.vp_stage, pp_rank=chunk.pg_collection.pp.rank()
    )
