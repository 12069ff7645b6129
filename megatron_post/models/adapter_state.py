"""The state of a chunk in a checkpoint: the whole model, or the adapter alone if the model has one."""

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_post.models.adapted import NAME, places
from megatron_post.models.adapters import split_dimension


def checkpoint_state(chunk: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """megatron-core's sharded state of a chunk.

    A model with adapters has those and the other trained parameters. Its frozen weights are read from
    `model.init_from` again. Objects that modules keep besides tensors, such as FP8 scales, always belong to
    the state.
    """
    state: dict[str, Any] = chunk.sharded_state_dict(metadata=metadata)
    found = _adapter_tensors(chunk)
    if all(parameter.requires_grad for parameter in chunk.parameters()):
        return state
    others = {
        name: item
        for name, item in state.items()
        if isinstance(item, ShardedObject) or (f".{NAME}." not in name and item.data.requires_grad)
    }
    return others | found


def _adapter_tensors(chunk: Any) -> dict[str, ShardedTensor]:
    """The parameters of adapters. Each name is one tensor of the whole model, stacked by layer."""
    found, tensor, replicas = {}, chunk.pg_collection.tp, chunk.pg_collection.dp_cp
    for place in places(chunk):
        for target, part, parameter in place.parameters:
            offsets, replica = [(0, place.layer, chunk.config.num_layers)], tensor.rank()
            dimension = split_dimension(target, part)
            if dimension is not None:
                offsets, replica = [*offsets, (1 + dimension, tensor.rank(), tensor.size())], 0
            key = f"decoder.layers.{place.name}.{NAME}.{target}_{part}"
            found[f"{key}.{place.layer}"] = ShardedTensor.from_rank_offsets(
                key, parameter, *offsets, replica_id=(0, replica, replicas.rank()), prepend_axis_num=1
            )
    return found
