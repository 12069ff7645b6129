"""Core attention of the portable layers: packed, grouped-query and context-parallel, in plain torch.

Keys and values are gathered over the context-parallel group, as Llama 3's own training did. Each rank
computes its own queries. On a CPU it uses `scaled_dot_product_attention` block by block, and on a GPU
FlexAttention with a block mask. Neither of them allocates a t x t mask.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_post.models.packing import PackedSegments


class PackedAttention(torch.nn.Module):
    """A replacement for megatron-core's core attention. `packed_seq_params` must be `PackedSegments`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert pg_collection is not None
        self._context_group = pg_collection.cp
        self._scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSegments | None = None,
    ) -> Tensor:
        """Attend within segments. Returns [t/cp, 1, heads/tp * d].

        query: [t/cp, 1, heads/tp, d]. key, value: [t/cp, 1, groups/tp, d].
        """
        assert isinstance(packed_seq_params, PackedSegments), "every pipeline stage needs the pack's segments"
        query, key, value = (x.squeeze(1).transpose(0, 1) for x in (query, key, value))  # [heads, t, d]
        if self._context_group.size() > 1:
            key = gather_sequence(key, packed_seq_params.gather_order, self._context_group)
            value = gather_sequence(value, packed_seq_params.gather_order, self._context_group)
        attend = flex_attention if query.is_cuda else block_attention
        output = attend(query, key, value, packed_seq_params, scale=self._scale)
        return output.transpose(0, 1).reshape(output.shape[1], 1, -1)


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments, *, scale: float
) -> Tensor:
    """Attention computed block by block. The cost is the sum of the squared segment lengths.

    query: [heads, t/cp, d]. key, value: [groups, t, d] in pack order. Returns [heads, t/cp, d].
    """
    # The pack is split once, at its segments. The gradient of a slice is as large as the sliced tensor, so
    # slicing the whole pack for every block would cost the square of the pack's length.
    keys, values = key.split(packed.segment_lengths, dim=1), value.split(packed.segment_lengths, dim=1)
    queries = query.split([block.queries for block in packed.blocks], dim=1)
    outputs = []
    for block, q in zip(packed.blocks, queries, strict=True):
        if not block.keys:
            outputs.append(torch.zeros_like(q))
            continue
        k, v = (_joined([x[segment][:, :count] for segment, count in block.keys]) for x in (keys, values))
        square = q.shape[1] == k.shape[1]
        mask = None
        if not square:
            ones = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
            mask = ones.tril(k.shape[1] - q.shape[1])
        output = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=square, scale=scale, enable_gqa=True
        )
        outputs.append(output[0])
    return torch.cat(outputs, dim=1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments, *, scale: float
) -> Tensor:
    """The same attention with FlexAttention. Of the mask only a block mask of 128 x 128 tiles is stored.

    query: [heads, t/cp, d]. key, value: [groups, t, d] in pack order. Returns [heads, t/cp, d].
    """
    kernel, mask = _flex_kernel(query.is_cuda), _block_mask(packed, compiled=query.is_cuda)
    return kernel(query[None], key[None], value[None], block_mask=mask, scale=scale, enable_gqa=True)[0]


def _block_mask(packed: PackedSegments, *, compiled: bool) -> Any:
    """FlexAttention's block mask of a pack. It is made once per microbatch and cached on `packed`.

    A token attends to itself and to earlier tokens of its segment, and to the real tokens of the segments
    that its segment sees.
    """
    cached = getattr(packed, "_block_mask", None)
    if cached is not None:
        return cached
    from torch.nn.attention.flex_attention import create_block_mask

    indices, segments, real, seen = packed.indices, packed.segments, packed.real, packed.seen
    assert indices is not None and segments is not None and real is not None
    # These have one value per token and not per segment. The number of segments differs from pack to pack,
    # and torch.compile would compile the kernel again for each number.
    low, high = (None, None) if seen is None else seen[segments].unbind(1)

    def allowed(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        position = indices[query_index]
        other = segments[key_index]
        inside = (segments[position] == other) & (key_index <= position)
        if low is None or high is None:
            return inside
        return inside | (real[key_index] & (low[position] <= other) & (other < high[position]))

    mask = create_block_mask(
        allowed, None, None, indices.numel(), segments.numel(), device=segments.device, _compile=compiled
    )
    packed._block_mask = mask
    return mask


@functools.cache
def _flex_kernel(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention as kernel

    return torch.compile(kernel, dynamic=False) if compiled else kernel


def gather_sequence(x: Tensor, order: Tensor | None, group: Any) -> Tensor:
    """Gather x [heads, t/cp, d] of all ranks into [heads, t, d] in pack order.

    The backward sums the gradients of all ranks, because every rank's queries use the gathered keys.
    """
    assert order is not None
    gathered = _GatherSequence.apply(x.transpose(0, 1).contiguous(), group)
    return gathered.index_select(0, order).transpose(0, 1)


class _GatherSequence(torch.autograd.Function):
    """All-gather along the first dimension. The backward is its transpose, a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        output = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
        torch.distributed.all_gather_into_tensor(output, x, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        group = ctx.group
        own = gradient.new_empty(gradient.shape[0] // group.size(), *gradient.shape[1:])
        torch.distributed.reduce_scatter_tensor(own, gradient.contiguous(), group=group)
        return own, None
