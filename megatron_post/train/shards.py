"""Which part of the model and of Adam's state each rank saves: its own, so that nothing is gathered first.

The distributed optimizer gives each data-parallel rank a run of the elements of its parameters, and that run
of the weights and of the three fp32 tensors behind them is what the rank saves. Cut into rectangles of the
whole tensors, runs are what torch's checkpoint format takes, under the keys of megatron-core's
"fully_reshardable" layout, so megatron-core loads them in any other layout.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

# How megatron-core names Adam's state; parameters alone have no prefix.
_STATES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """A rectangle of a tensor. shape: of the whole; offsets: where it begins; values: live, do not change."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor


def own_shards(model_state: dict[str, Any], optimizer: MegatronOptimizer) -> list[Shard]:
    """What this rank saves of tensors; all ranks together save every element once.

    model_state: `sharded_state_dict` of the model's chunks. Values are views of the live tensors. Weights of
    other data-parallel ranks are not looked at, for they may be stale until the next forward gathers them.
    """
    tensors = {
        id(item.data): item
        for item in nested_values(model_state)
        if isinstance(item, ShardedTensor | ShardedTensorFactory)
    }
    shards: list[Shard] = []
    for part in _parts(optimizer):
        for param, start, end in _own_runs(part):
            item = tensors[id(param)]
            # replicas over pipeline and tensor ranks are saved by the first; the data ranks have shared out
            if any(item.replica_id[:2]):
                continue
            run = param.detach().reshape(-1)[start:end]
            shards += _cut(item, run, start, prefix="")
            for name, values in _adam_state(part, param).items():
                shards += _cut(item, values.detach(), start, prefix=f"optimizer.state.{name}.")
    optimized = {
        id(p) for part in _parts(optimizer) for buffer in part.buffers for p in buffer.param_index_map
    }
    for identity, item in tensors.items():
        if identity not in optimized and is_main_replica(item.replica_id):
            shards += _cut(item, item.data.detach().reshape(-1), 0, prefix="")
    return shards


def own_objects(model_state: dict[str, Any]) -> dict[str, bytes]:
    """What modules keep beside tensors, such as FP8's scales: key -> a saved list of one object."""
    objects = {}
    for item in nested_values(model_state):
        if isinstance(item, ShardedObject) and is_main_replica(item.replica_id):
            stream = io.BytesIO()
            torch.save([item.data], stream)
            objects[item.unique_key] = stream.getvalue()
    return objects


def rectangles(
    shape: tuple[int, ...], start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut the elements [start, end) of a row-major tensor into rectangles: offsets and sizes of each, in
    order.

    Of a matrix at most three: the rest of a row, whole rows, the beginning of a row. Of [3, 4], elements 2 to
    9: 1 x 2 at (0, 2); 1 x 4 at (1, 0); 1 x 1 at (2, 0).
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), end // row
    if start < first * row:
        stop = min(end, first * row)
        for offsets, sizes in rectangles(shape[1:], start % row, stop - start // row * row):
            yield (start // row, *offsets), (1, *sizes)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if max(first, last) * row < end and first <= last:
        for offsets, sizes in rectangles(shape[1:], 0, end - last * row):
            yield (last, *offsets), (1, *sizes)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _own_runs(optimizer: Any) -> Iterator[tuple[Tensor, int, int]]:
    """Parameters and the run of their elements that this rank's optimizer updates."""
    for maps in optimizer.gbuf_ranges:
        for buckets in maps.values():
            for bucket in buckets:
                for param, ranges in bucket["param_map"].items():
                    yield param, ranges["param"].start, ranges["param"].end


def _adam_state(optimizer: Any, param: Tensor) -> dict[str, Tensor]:
    """fp32 [run] each. Moments of a parameter that Adam has not met yet are zero, as it would begin."""
    state = optimizer._get_main_param_and_optimizer_states(param)
    return {name: state[name] if name in state else torch.zeros_like(state["param"]) for name in _STATES}


def _cut(
    item: ShardedTensor | ShardedTensorFactory, run: Tensor, start: int, *, prefix: str
) -> Iterator[Shard]:
    """Shards of the elements from `start` on, as `run` [n] holds them, of a model's tensor."""
    whole = item.data
    tensors = [item] if isinstance(item, ShardedTensor) else list(nested_values({"": item.build()}))
    for tensor in tensors:
        assert tensor.data.is_contiguous()
        offset = (tensor.data.data_ptr() - whole.data_ptr()) // whole.element_size()
        assert 0 <= offset <= whole.numel() - tensor.data.numel(), f"{item.key}: a factory made a copy"
        stacked, local = tensor.prepend_axis_num, tuple(tensor.local_shape)
        first, last = max(start, offset), min(start + len(run), offset + prod(local))
        position = first - start
        for place, sizes in rectangles(local, first - offset, last - offset):
            count = prod(sizes)
            origin = tensor.global_offset
            yield Shard(
                prefix + tensor.key,
                tuple(tensor.global_shape),
                (*origin[:stacked], *(o + p for o, p in zip(origin[stacked:], place, strict=True))),
                run[position : position + count].view((1,) * stacked + sizes),
            )
            position += count
