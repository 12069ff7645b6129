"""Puts adapters on the linear layers of a model, finds them, and switches them off."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_post.config.adapter import Adapter as Settings
from megatron_post.config.sections import Model
from megatron_post.models.adapters import LINEARS, PARTS, Adapter

NAME = "adapter"  # of the module within its linear layer


def attach_adapters(model: Any, settings: Settings, shape: Model) -> None:
    """Give the linear layers of a chunk their adapters, and freeze everything else but a scalar head."""
    model.requires_grad_(False)
    if model.scalar_head and model.post_process:
        model.output_layer.requires_grad_(True)
    for layer in model.decoder.layers:
        for name, targets in LINEARS.items():
            if set(targets).isdisjoint(settings.targets):
                continue
            linear = layer.get_submodule(name)
            whole_name, group = f"{layer.layer_number - 1}.{name}", model.pg_collection.tp
            linear.add_module(NAME, Adapter(settings, shape, model.config, whole_name, group=group))
            # A hook and not a subclass, because Transformer Engine's layers exist only on machines with it.
            # It calls the adapter as a module, so that data parallelism gathers its parameters first.
            linear.register_forward_hook(_adapt)
    if model.pre_process and model.config.recompute_granularity is not None:
        # A recomputed layer has a gradient only if its input has one, and the embedding is frozen.
        model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


def _adapt(linear: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    values, bias = output
    return linear.adapter(inputs[0], values, linear.weight), bias


@dataclass(frozen=True)
class Place:
    """An adapter with the linear layer that it adapts, its number in the model, and its name in a layer."""

    layer: int
    name: str
    linear: Any
    adapter: Adapter

    @property
    def parameters(self) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
        """(target, part, parameter) of everything that is trained."""
        for target in self.adapter.targets:
            for part in PARTS if self.adapter.is_dora else PARTS[:2]:
                yield target, part, self.adapter.part(target, part)


def places(chunk: Any) -> Iterator[Place]:
    """Every adapter of a chunk. The chunk must not be wrapped."""
    for layer in chunk.decoder.layers:
        for name in LINEARS:
            linear = layer.get_submodule(name)
            if hasattr(linear, NAME):
                yield Place(layer.layer_number - 1, name, linear, linear.adapter)


def base_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The names and parameters of a chunk without those of its adapters."""
    yield from (item for item in chunk.named_parameters() if f".{NAME}." not in item[0])


@contextlib.contextmanager
def without_adapters(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within this context the chunks compute the base model, and no layer is recomputed.

    Afterwards each chunk is in the mode in which it was, for training or for evaluation.
    """
    training = [chunk.training for chunk in chunks]
    found = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapter)]
    for adapter in found:
        adapter.enabled = False
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for adapter in found:
            adapter.enabled = True
        for chunk, mode in zip(chunks, training, strict=True):
            chunk.train(mode)
