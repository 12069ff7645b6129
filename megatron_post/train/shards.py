"""Which part of the model and of Adam's state each rank saves and loads: its own; nothing is gathered.

The distributed optimizer gives each data-parallel rank a run of the elements of its parameters, and that run
of the weights and of the three fp32 tensors behind them is what the rank saves. Cut into rectangles of the
whole tensors, runs are what torch's checkpoint format takes, under the keys of megatron-core's
"fully_reshardable" layout, so that any other layout finds its own runs in them.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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

from megatron_post.config.schema import Config
from megatron_post.convert.mapping import hf_shapes
from megatron_post.models.build import padded_vocab_size

# How megatron-core names Adam's state; parameters alone have no prefix.
_STATES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """A rectangle of a tensor. shape: of the whole; offsets: where it begins; values: the live ones.

    stacked: leading dimensions that number layers. may_be_padded: the whole may have more or fewer rows in
    another layout, which hold nothing.
    """

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor
    stacked: int = 0
    may_be_padded: bool = False


def own_shards(model_state: dict[str, Any], optimizer: MegatronOptimizer) -> Iterator[Shard]:
    """What this rank saves of tensors; all ranks together save every element once.

    model_state: `sharded_state_dict` of the model's chunks. Values are views of the live tensors. Weights of
    other data-parallel ranks are not looked at, for they may be stale until the next forward gathers them.
    """
    for run in _own_runs(model_state, optimizer):
        # replicas over pipeline and tensor ranks are saved by the first; the data ranks have shared out
        if not any(run.item.replica_id[:2]):
            yield from _cut(run.item, run.weights, run.start, prefix="")
            for name, values in run.adam_state().items():
                yield from _cut(run.item, values, run.start, prefix=f"optimizer.state.{name}.")
    for item in _without_optimizer(model_state, optimizer):
        if is_main_replica(item.replica_id):
            yield from _cut(item, item.data.detach().reshape(-1), 0, prefix="")


def checkpoint_bytes(config: Config) -> int:
    """Bytes of the tensors that `own_shards` of all ranks save: weights in the dtype that they are trained
    in, and in fp32 their masters and Adam's moments. 14 a parameter in bf16, 16 in fp32."""
    model = config.model.model_copy(update={"vocab_size": padded_vocab_size(config)})
    shapes = hf_shapes(model, scalar_head=config.stage == "reward").values()
    weight = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    return sum(map(prod, shapes)) * (weight.itemsize + len(_STATES) * torch.float32.itemsize)


def needed_shards(
    model_state: dict[str, Any], optimizer: MegatronOptimizer, *, weights_only: bool
) -> Iterator[Shard]:
    """What this rank loads: its runs of the weights, which are then to be gathered, and of the optimizer's
    state, unless it wants `weights_only`. That state must have been made."""
    for run in _own_runs(model_state, optimizer):
        yield from _cut(run.item, run.weights, run.start, prefix="")
        for name in () if weights_only else _STATES:
            values = run.state()[name].detach()
            yield from _cut(run.item, values, run.start, prefix=f"optimizer.state.{name}.")
    for item in _without_optimizer(model_state, optimizer):
        yield from _cut(item, item.data.detach().reshape(-1), 0, prefix="")


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


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


@dataclass(frozen=True)
class _Run:
    """The elements [start, start + n) of a parameter, which this rank's optimizer updates. weights: [n]."""

    item: ShardedTensor | ShardedTensorFactory
    start: int
    weights: Tensor
    state: Callable[[], dict[str, Tensor]]

    def adam_state(self) -> dict[str, Tensor]:
        """fp32 [n] each. Moments of a parameter that Adam has not met yet are zero, as it would begin."""
        state = self.state()
        missing = {name: torch.zeros_like(state["param"]) for name in _STATES if name not in state}
        return {name: (missing | state)[name].detach() for name in _STATES}


def _own_runs(model_state: dict[str, Any], optimizer: MegatronOptimizer) -> Iterator[_Run]:
    tensors = {id(item.data): item for item in _items(model_state)}
    for part in optimizer_parts(optimizer):
        buckets = [bucket for maps in part.gbuf_ranges for found in maps.values() for bucket in found]
        for param, ranges in [pair for bucket in buckets for pair in bucket["param_map"].items()]:
            start, end = ranges["param"].start, ranges["param"].end
            state = partial(part._get_main_param_and_optimizer_states, param)
            yield _Run(tensors[id(param)], start, param.detach().reshape(-1)[start:end], state)


def _without_optimizer(
    model_state: dict[str, Any], optimizer: MegatronOptimizer
) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    buffers = [buffer for part in optimizer_parts(optimizer) for buffer in part.buffers]
    optimized = {id(param) for buffer in buffers for param in buffer.param_index_map}
    yield from (item for item in _items(model_state) if id(item.data) not in optimized)


def _items(model_state: dict[str, Any]) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    found = nested_values(model_state)
    yield from (item for item in found if isinstance(item, ShardedTensor | ShardedTensorFactory))


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
                stacked,
                tensor.allow_shape_mismatch,
            )
            position += count
