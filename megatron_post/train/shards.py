"""The parts of the model and of Adam's state that each rank saves and loads. Nothing is gathered for a save.

The distributed optimizer gives each data-parallel rank a range of the elements of each parameter. The rank
saves this slice of the weights, and the same slice of their fp32 masters and of Adam's two moments. torch's
checkpoint format stores rectangles of whole tensors, so each slice is cut into rectangles. The keys are those
of megatron-core's "fully_reshardable" layout. Any other layout can then read its own slices.
"""

import dataclasses
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
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_post.config.schema import Config
from megatron_post.convert.adapter_weights import peft_shapes
from megatron_post.convert.mapping import hf_shapes
from megatron_post.models.build import padded_vocab_size
from megatron_post.parallel.adam import moments_dtype

# megatron-core's names of Adam's state. In a checkpoint its keys have a prefix, and those of weights have
# none.
_STATES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """A rectangle of a tensor.

    shape: of the whole tensor. offsets: where the rectangle begins. values: a view of the live tensor.
    stacked: number of leading dimensions that count layers. may_be_padded: the tensor may have more or fewer
    rows in another layout. The additional rows are padding. rounded_to: the dtype of a checkpoint, if it is
    not that of the values.
    """

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor
    stacked: int = 0
    may_be_padded: bool = False
    rounded_to: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in a checkpoint."""
        return self.rounded_to or self.values.dtype


def own_shards(model_state: dict[str, Any], optimizer: MegatronOptimizer) -> Iterator[Shard]:
    """The rectangles that this rank saves. All ranks together save every element once.

    model_state: `sharded_state_dict` of the model's chunks. Values are views of the live tensors. Weights
    that other data-parallel ranks update are not read, because they may be stale until the next forward
    gathers them. Weights that a layer keeps in FP8 are saved in bf16, from the optimizer's fp32 weights.
    """
    for own in _own_slices(model_state, optimizer):
        # Of replicas over pipeline and tensor ranks, the first one is saved. Data-parallel ranks have no
        # replicas here, because each has its own slice.
        if not any(own.item.replica_id[:2]):
            yield from own.weight_shards()
            for name, values in own.adam_state().items():
                yield from _cut(own.item, values, own.start, prefix=f"optimizer.state.{name}.")
    for item in _without_optimizer(model_state, optimizer):
        if is_main_replica(item.replica_id):
            yield from _cut(item, item.data.detach().reshape(-1), 0, prefix="")


def checkpoint_bytes(config: Config) -> int:
    """Bytes of the tensors in a checkpoint, as `own_shards` of all ranks save them.

    These are the trained weights in the dtype of training, their masters in fp32, and Adam's two moments. One
    parameter takes 14 bytes with bf16 and 16 with fp32, and 4 bytes less with moments in bf16.
    """
    model, traits = config.model, config.traits
    heads = {"scalar_head": traits.scalar_head, "scores_steps": traits.scores_steps}
    if config.adapter is None:
        padded = model.model_copy(update={"vocab_size": padded_vocab_size(config)})
        shapes = hf_shapes(padded, **heads)
    else:
        shapes = peft_shapes(config.adapter, model, **heads)
    element = {"bf16": 2, "fp32": 4}
    state = element["fp32"] + 2 * element[config.optimizer.moments]
    return sum(map(prod, shapes.values())) * (element[config.precision.dtype] + state)


def needed_shards(
    model_state: dict[str, Any], optimizer: MegatronOptimizer, *, weights_only: bool, rounds: bool
) -> Iterator[Shard]:
    """The rectangles that this rank loads: its slices of the weights, and of Adam's state.

    The caller then gathers the weights. Adam's state must have been allocated. With `weights_only` it is left
    out. rounds: the caller rounds the layers' weights from the optimizer's fp32 weights. Those are then
    loaded, with `weights_only` from the weights.
    """
    for own in _own_slices(model_state, optimizer):
        if weights_only or not rounds:
            weights = own.state()["param"].detach() if rounds else own.weights()
            yield from _cut(own.item, weights, own.start, prefix="")
        for name in () if weights_only else _STATES:
            values = own.state()[name].detach()
            yield from _cut(own.item, values, own.start, prefix=f"optimizer.state.{name}.")
    for item in _without_optimizer(model_state, optimizer):
        yield from _cut(item, item.data.detach().reshape(-1), 0, prefix="")


def own_objects(model_state: dict[str, Any]) -> dict[str, bytes]:
    """Objects that modules keep besides tensors, such as FP8 scales.

    key -> a serialized list of one object.
    """
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
    """Cut the elements [start, end) of a row-major tensor into rectangles. Yields their offsets and sizes.

    A matrix gives at most three: the rest of a row, whole rows, and the beginning of a row. Elements 2 to 9
    of a tensor [3, 4] give 1 x 2 at (0, 2), 1 x 4 at (1, 0) and 1 x 1 at (2, 0).
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
    """The distributed optimizers that make up an optimizer."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def own_ranges(part: Any) -> Iterator[tuple[Tensor, int, int]]:
    """(parameter, start, end) of the elements that this rank updates. part: a distributed optimizer."""
    buckets = [bucket for maps in part.gbuf_ranges for found in maps.values() for bucket in found]
    for parameter, ranges in [pair for bucket in buckets for pair in bucket["param_map"].items()]:
        yield parameter, ranges["param"].start, ranges["param"].end


@dataclass(frozen=True)
class _Slice:
    """The elements [start, end) of a parameter, which this rank's optimizer updates.

    state: returns Adam's state of the slice under the names of `_STATES`. moments: the dtype of its moments.
    """

    item: ShardedTensor | ShardedTensorFactory
    parameter: Tensor
    start: int
    end: int
    state: Callable[[], dict[str, Tensor]]
    moments: torch.dtype

    def weights(self) -> Tensor:
        """A view of the layer's weights, [n]."""
        return self.parameter.detach().reshape(-1)[self.start : self.end]

    def weight_shards(self) -> Iterator[Shard]:
        """The rectangles of the weights for a checkpoint."""
        if not is_float8tensor(self.parameter):
            yield from _cut(self.item, self.weights(), self.start, prefix="")
            return
        exact = self.state()["param"].detach()
        for shard in _cut(self.item, exact, self.start, prefix=""):
            yield dataclasses.replace(shard, rounded_to=self.parameter.dtype)

    def adam_state(self) -> dict[str, Tensor]:
        """Adam's state, [n] each. Moments are zero if Adam has not updated the parameter yet."""
        state = self.state()
        zeros = partial(torch.zeros_like, state["param"], dtype=self.moments)
        missing = {name: zeros() for name in _STATES if name not in state}
        return {name: (missing | state)[name].detach() for name in _STATES}


def _own_slices(model_state: dict[str, Any], optimizer: MegatronOptimizer) -> Iterator[_Slice]:
    tensors = {id(item.data): item for item in _items(model_state)}
    for part in optimizer_parts(optimizer):
        for parameter, start, end in own_ranges(part):
            state = partial(part._get_main_param_and_optimizer_states, parameter)
            moments = moments_dtype(part.optimizer)
            yield _Slice(tensors[id(parameter)], parameter, start, end, state, moments)


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
    item: ShardedTensor | ShardedTensorFactory, values: Tensor, start: int, *, prefix: str
) -> Iterator[Shard]:
    """Cut `values` [n], which are the elements of a model's tensor from `start` on, into shards."""
    whole = _storage(item.data)
    # A factory stands for a tensor that the checkpoint stores in several parts, such as the gate and up
    # projections of the MLP. Its parts are views of the tensor, so pointers give their offsets.
    if isinstance(item, ShardedTensor):
        tensors = [item]
    else:
        tensors = list(
            nested_values({"": item.build_fn(item.key, whole, item.replica_id, item.flattened_range)})
        )
    for tensor in tensors:
        data = _storage(tensor.data)
        assert data.is_contiguous()
        offset = (data.data_ptr() - whole.data_ptr()) // whole.element_size()
        assert 0 <= offset <= whole.numel() - data.numel(), f"{item.key}: a factory made a copy"
        stacked, local = tensor.prepend_axis_num, tuple(tensor.local_shape)
        first, last = max(start, offset), min(start + len(values), offset + prod(local))
        position = first - start
        for place, sizes in rectangles(local, first - offset, last - offset):
            count = prod(sizes)
            origin = tensor.global_offset
            yield Shard(
                prefix + tensor.key,
                tuple(tensor.global_shape),
                (*origin[:stacked], *(o + p for o, p in zip(origin[stacked:], place, strict=True))),
                values[position : position + count].view((1,) * stacked + sizes),
                stacked,
                tensor.allow_shape_mismatch,
            )
            position += count


def _storage(weights: Tensor) -> Tensor:
    """The memory of weights. Those in FP8 are a wrapper of bytes of the same shape."""
    if not is_float8tensor(weights):
        return weights
    found: Tensor = weights.get_data_tensors(columnwise_data=False)  # type: ignore[attr-defined]
    return found
