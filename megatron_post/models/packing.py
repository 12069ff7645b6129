"""What every layer needs to know of a pack: segments, positions and, under context parallelism, who holds
what."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_post.parallel.context import gathered_order, zigzag_indices


@dataclass(frozen=True)
class AttentionBlock:
    """Queries `[query_start, query_end)` of this rank attend causally to keys `[key_start, key_end)` of the
    pack.

    The last query sees the last key (lower-right causal): with c context-parallel ranks a segment is two
    blocks.
    """

    query_start: int
    query_end: int
    key_start: int
    key_end: int


@dataclass
class PackedSegments(PackedSeqParams):
    """`PackedSeqParams` of the portable layers. Another `qkv_format` than "thd" keeps megatron-core's own
    packed paths, which need Transformer Engine, out of the way.

    positions: int64 [t / cp], positions of this rank's tokens in their segments.
    indices: int64 [t / cp], where this rank's tokens stand in the pack.
    segments: int32 [t], the segment of every token of the pack.
    gather_order: int64 [t] or None, order of the pack in the concatenation of all ranks' tokens.
    blocks: the attention that this rank computes.
    """

    positions: Tensor | None = None
    indices: Tensor | None = None
    segments: Tensor | None = None
    gather_order: Tensor | None = None
    blocks: tuple[AttentionBlock, ...] = ()


def portable_segments(
    cu_seqlens: Tensor, positions: Tensor, *, context_rank: int, context_size: int
) -> PackedSegments:
    """Packed parameters for the portable layers. cu_seqlens: int [n + 1] of the pack; positions: int64 [t /
    cp]."""
    lengths = cu_seqlens.diff().long()
    segments = torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), lengths)
    return PackedSegments(
        qkv_format="sbhd",
        cp_group=None,
        positions=positions,
        indices=zigzag_indices(cu_seqlens, rank=context_rank, size=context_size),
        segments=segments.int(),
        gather_order=gathered_order(cu_seqlens, size=context_size) if context_size > 1 else None,
        blocks=_blocks(cu_seqlens.tolist(), rank=context_rank, size=context_size),
    )


def transformer_engine_segments(cu_seqlens: Tensor) -> PackedSeqParams:
    """Packed parameters for Transformer Engine's attention, which splits `cu_seqlens` (int32, whole pack)
    itself."""
    longest = int(cu_seqlens.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _blocks(cu_seqlens: list[int], *, rank: int, size: int) -> tuple[AttentionBlock, ...]:
    pairs = list(pairwise(cu_seqlens))
    if size == 1:
        return tuple(AttentionBlock(start, end, start, end) for start, end in pairs)
    blocks = []
    for start, end in pairs:
        chunk, query = (end - start) // (2 * size), start // size
        for half, position in enumerate((rank, 2 * size - 1 - rank)):
            query_start = query + half * chunk
            blocks.append(
                AttentionBlock(query_start, query_start + chunk, start, start + (position + 1) * chunk)
            )
    return tuple(blocks)
