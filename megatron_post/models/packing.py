"""What every layer needs to know of a pack: segments, positions and, under context parallelism, who holds
what."""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_post.data.batch import PackedBatch, segment_numbers
from megatron_post.parallel.context import gathered_order, zigzag_indices


@dataclass(frozen=True)
class AttentionBlock:
    """The next `queries` tokens of this rank attend causally to the first tokens of some segments of the
    pack.

    keys: (segment, number of its first tokens), in pack order. The last query sees the last key (lower-right
    causal): with c context-parallel ranks a segment is two blocks. A response that stands behind a prompt
    which it shares sees the prompt's segment and its own.
    """

    queries: int
    keys: tuple[tuple[int, int], ...]


@dataclass
class PackedSegments(PackedSeqParams):
    """`PackedSeqParams` of the portable layers. Another `qkv_format` than "thd" keeps megatron-core's own
    packed paths, which need Transformer Engine, out of the way.

    positions: int64 [t / cp], positions of this rank's tokens in what they continue.
    indices: int64 [t / cp], where this rank's tokens stand in the pack.
    segments: int64 [t], the segment of every token of the pack; real: bool [t], whether it is no padding.
    seen: int64 [n, 2], which earlier segments (from, to) each segment sees besides itself.
    gather_order: int64 [t] or None, order of the pack in the concatenation of all ranks' tokens.
    segment_lengths: tokens of each segment; blocks: the attention that this rank computes, in token order.
    """

    positions: Tensor | None = None
    indices: Tensor | None = None
    segments: Tensor | None = None
    real: Tensor | None = None
    seen: Tensor | None = None
    gather_order: Tensor | None = None
    segment_lengths: tuple[int, ...] = ()
    blocks: tuple[AttentionBlock, ...] = ()


def portable_segments(batch: PackedBatch, *, context_rank: int, context_size: int) -> PackedSegments:
    """Packed parameters for the portable layers, from this rank's part of a batch."""
    cu_seqlens = batch.cu_seqlens
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    segments = segment_numbers(cu_seqlens)
    within = torch.arange(len(segments), device=segments.device) - starts[segments]
    return PackedSegments(
        qkv_format="sbhd",
        cp_group=None,
        positions=batch.positions,
        indices=zigzag_indices(cu_seqlens, rank=context_rank, size=context_size),
        segments=segments,
        real=within < batch.lengths.long()[segments],
        seen=batch.seen,
        gather_order=gathered_order(cu_seqlens, size=context_size) if context_size > 1 else None,
        segment_lengths=tuple(lengths.tolist()),
        blocks=_blocks(batch, rank=context_rank, size=context_size),
    )


def transformer_engine_segments(
    cu_seqlens: Tensor, *, context_size: int, device: torch.device
) -> PackedSeqParams:
    """Packed parameters on `device` for Transformer Engine's attention, which splits `cu_seqlens` (int32,
    whole pack, on the host, so that nothing waits for the GPU) itself."""
    longest = int(cu_seqlens.diff().max())
    cu_seqlens = cu_seqlens.to(device)
    # Padding belongs to its segment here, so the padded lengths are the same. Transformer Engine reads them
    # under context parallelism. Without it, it would compare the two on the host, twice in every layer.
    padded = cu_seqlens if context_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _blocks(batch: PackedBatch, *, rank: int, size: int) -> tuple[AttentionBlock, ...]:
    real = batch.lengths.tolist()
    seen = batch.seen.tolist() if batch.seen is not None else [(0, 0)] * len(real)
    blocks = []
    for segment, length in enumerate(batch.cu_seqlens.diff().tolist()):
        # of earlier segments only real tokens: their padding stands between them and what continues them
        earlier = tuple((other, real[other]) for other in range(*seen[segment]))
        if size == 1:
            blocks.append(AttentionBlock(length, (*earlier, (segment, length))))
            continue
        chunk = length // (2 * size)
        for position in (rank, 2 * size - 1 - rank):  # the zigzag split
            blocks.append(AttentionBlock(chunk, (*earlier, (segment, (position + 1) * chunk))))
    return tuple(blocks)
