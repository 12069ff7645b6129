"""Loads weights and optimizer state from a checkpoint of any layout into the layout of this run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from megatron_post.convert.dist_checkpoint import DistCheckpoint
from megatron_post.convert.source import Kind
from megatron_post.convert.torch_file import load_plain
from megatron_post.models.adapter_state import checkpoint_state
from megatron_post.storage.manifest import DamagedCheckpoint
from megatron_post.train.fp8_weights import has_fp8_weights, round_weights
from megatron_post.train.optimizer import gather_weights, load_optimizer_state
from megatron_post.train.shards import Shard, needed_shards, optimizer_parts

# This stores optimizer state by parameter and not by gradient bucket, so that any layout can load it.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def load_checkpoint(
    source: DistCheckpoint,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    *,
    weights_only: bool,
) -> None:
    """Load weights and optimizer state. With `weights_only` the optimizer starts new from the weights.

    All ranks must call this function, after the checkpoint has been verified. Each rank reads only the
    elements that its optimizer updates, directly into the live tensors. The data-parallel ranks then gather
    the weights. So every byte is read about once. With megatron-core's loader each rank would read the state
    of all ranks. Weights in FP8 are rounded from the optimizer's fp32 weights, which are loaded instead.

    Modules may keep objects besides tensors, such as FP8 scales. They keep their initial values if the
    checkpoint has none, because it was converted or was written by the portable layers.

    Raises `DamagedCheckpoint` on all ranks if the checkpoint belongs to another model.
    """
    models = unwrap_model(chunks)
    states = {str(i): checkpoint_state(model, METADATA) for i, model in enumerate(models)}
    objects: list[dict[str, Any]] = []
    rounds, error = has_fp8_weights(chunks), None
    try:
        _read_own(source, states, optimizer, weights_only=weights_only, rounds=rounds)
        objects = [_read_objects(source, state) for state in states.values()]
    except Exception as found:  # damage in a file that another process wrote can raise any error
        error = str(found) if isinstance(found, ValueError) else f"{type(found).__name__}: {found}"
    # No rank may enter the all-gather while another has an error and does not take part.
    _raise_together(source.directory, error)
    if rounds:
        round_weights(optimizer)
    gather_weights(chunks)
    if weights_only and not rounds:
        # The optimizer updates fp32 master weights. They still hold the initial values.
        optimizer.reload_model_params()
    for model, found_objects in zip(models, objects, strict=True):
        model.load_state_dict(found_objects, strict=False)


def _read_own(
    source: DistCheckpoint,
    states: dict[str, Any],
    optimizer: MegatronOptimizer,
    *,
    weights_only: bool,
    rounds: bool,
) -> None:
    if not weights_only:
        common = load_plain(source.directory / "common.pt")
        for part in optimizer_parts(optimizer):
            load_optimizer_state(part, common["optimizer"])
    kinds = source.kinds
    for shard in needed_shards(states, optimizer, weights_only=weights_only, rounds=rounds):
        _check_shape(source.directory, shard, kinds.get(shard.key))
        _read(source, shard)


def _read_objects(source: DistCheckpoint, state: dict[str, Any]) -> dict[str, Any]:
    """The objects that a chunk's modules keep besides tensors, if the checkpoint has them."""
    wanted = {name: item.unique_key for name, item in state.items() if isinstance(item, ShardedObject)}
    return {name: source.read_object(key) for name, key in wanted.items() if key in source.objects}


def _raise_together(directory: Path, error: str | None) -> None:
    """Raises on all ranks if any rank has an error. Otherwise the others would wait for that rank forever."""
    errors: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    found = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
    if found:
        raise DamagedCheckpoint(
            f"{directory} cannot be resumed here. {len(found)} ranks report an error, the first is {found[0]}"
        )


def _check_shape(directory: Path, shard: Shard, stored: Kind | None) -> None:
    fixed = 1 if shard.may_be_padded else 0
    if stored is None or stored.shape[fixed:] != shard.shape[fixed:]:
        there = "absent" if stored is None else stored.shape
        raise DamagedCheckpoint(f"{directory}: {shard.key} is {there} there, {shard.shape} here")


def _read(source: DistCheckpoint, shard: Shard) -> None:
    layer, values = None, shard.values
    if shard.stacked:
        layer, values = shard.offsets[0], values[0]
    if shard.may_be_padded:
        values.zero_()
    filled = source.read_rectangle(shard.key, layer, shard.offsets[shard.stacked :], values)
    if filled != values.numel() and not shard.may_be_padded:
        raise DamagedCheckpoint(f"{source.directory}: the chunks of {shard.key} do not cover it")
