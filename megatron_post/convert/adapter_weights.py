"""The values of adapters: their names in PEFT, random initial values, loading and gathering."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from megatron_post.config.adapter import Adapter
from megatron_post.config.sections import Model
from megatron_post.convert.mapping import SCORE, SCORE_BIAS, hf_shapes
from megatron_post.models.adapted import places
from megatron_post.models.adapters import LINEARS, split_dimension, target_shape
from megatron_post.models.llama import Llama

PREFIX = "base_model.model."
HEAD = (*SCORE, *SCORE_BIAS)  # a reward model's head, which is trained in full
SUFFIXES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
MODULES = {
    target: ("self_attn." if linear.startswith("self_attention") else "mlp.") + target
    for linear, targets in LINEARS.items()
    for target in targets
}


class AdapterSource(Protocol):
    """Anything that has the tensors of an adapter by their names in PEFT."""

    def read(self, name: str) -> Tensor | None:
        """The whole tensor. None for a magnitude that is the length of the base model's row."""


def peft_name(layer: int, target: str, part: str) -> str:
    """The name of a part of an adapter in PEFT's files."""
    return f"{PREFIX}model.layers.{layer}.{MODULES[target]}.{SUFFIXES[part]}"


def peft_shapes(
    settings: Adapter, model: Model, *, scalar_head: bool = False, scores_steps: bool = False
) -> dict[str, tuple[int, ...]]:
    """Every tensor of an adapter and of a trained head with its shape, by PEFT's name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(model.num_layers):
        for target in settings.targets:
            rows, columns = target_shape(target, model)
            shapes[peft_name(layer, target, "A")] = (settings.rank, columns)
            shapes[peft_name(layer, target, "B")] = (rows, settings.rank)
            if settings.kind == "dora":
                shapes[peft_name(layer, target, "magnitude")] = (rows,)
    whole = hf_shapes(model, scalar_head=scalar_head, scores_steps=scores_steps)
    return shapes | {PREFIX + name: whole[name] for name in HEAD if name in whole}


class RandomAdapter:
    """PEFT's initial values. They are identical in every layout of ranks.

    B is zero, so the model is unchanged. A is uniform within 1 / sqrt(columns). Each tensor is drawn whole
    from (seed, name).
    """

    def __init__(self, settings: Adapter, model: Model, *, seed: int) -> None:
        self._shapes, self._seed = peft_shapes(settings, model), seed

    def read(self, name: str) -> Tensor | None:
        shape = self._shapes[name]
        if name.endswith(SUFFIXES["magnitude"]):
            return None
        if name.endswith(SUFFIXES["B"]):
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
        return torch.empty(shape).uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator)


@torch.no_grad()
def load_adapters(chunks: list[Llama], source: AdapterSource) -> None:
    """Fill the adapters of chunks. The base weights must have been loaded, because DoRA measures them."""
    for chunk in chunks:
        group = chunk.pg_collection.tp
        for place in places(chunk):
            measured = False
            for target, part, parameter in place.parameters:
                values = source.read(peft_name(place.layer, target, part))
                if values is None:
                    measured = True
                    continue
                dimension = split_dimension(target, part)
                if dimension is not None:
                    values = values.chunk(group.size(), dimension)[group.rank()]
                parameter.copy_(values)
            if measured:
                place.adapter.start_magnitudes(place.linear.weight)


def gathered_adapters(
    chunks: list[Llama], *, value_of: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """This stage's tensors of adapters by PEFT's names, one at a time, on the CPU of tensor rank 0.

    All tensor-parallel ranks must iterate to the end, because each step is a collective. Only the first rank
    receives tensors. value_of: takes a parameter to the tensor that is gathered.
    """
    for chunk in chunks:
        group = chunk.pg_collection.tp
        for place in places(chunk):
            for target, part, parameter in place.parameters:
                value, dimension = value_of(parameter).contiguous(), split_dimension(target, part)
                shards = [value]
                if dimension is not None and group.size() > 1:
                    shards = [torch.empty_like(value) for _ in range(group.size())]
                    torch.distributed.all_gather(shards, value, group=group)
                if group.rank() == 0:
                    whole = torch.cat([shard.cpu() for shard in shards], dimension or 0)
                    yield peft_name(place.layer, target, part), whole
