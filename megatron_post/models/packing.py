"""What every layer needs to know of a pack: segments, positions and, under context parallelism, who holds
what."""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_post.data.batch import PackedBatch
from megatron_post.parallel.context import ContextSplit


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


def portable_segments(
    whole: PackedBatch, split: ContextSplit, *, rank: int, device: torch.device
) -> PackedSegments:
    """Packed parameters on `device` for the portable layers of a context-parallel rank. whole: the pack,
    before it is split."""
    starts = whole.cu_seqlens[:-1].long()
    within = torch.arange(len(whole.segments), device=starts.device) - starts[whole.segments]
    real = within < whole.lengths.long()[whole.segments]
    indices = split.indices(rank)

    def moved(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    return PackedSegments(
        qkv_format="sbhd",
        cp_group=None,
        positions=moved(whole.positions[indices]),
        indices=moved(indices),
        segments=moved(whole.segments),
        real=moved(real),
        seen=None if whole.seen is None else moved(whole.seen),
        gather_order=moved(split.order) if split.size > 1 else None,
        segment_lengths=tuple(whole.cu_seqlens.diff().tolist()),
        blocks=_blocks(whole, split, rank=rank),
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


def _blocks(whole: PackedBatch, split: ContextSplit, *, rank: int) -> tuple[AttentionBlock, ...]:
    real = whole.lengths.tolist()
    seen = whole.seen.tolist() if whole.seen is not None else [(0, 0)] * len(real)
    blocks = []
    for segment, start, end in split.chunks(rank):
        # of earlier segments only real tokens: their padding stands between them and what continues them
        earlier = tuple((other, real[other]) for other in range(*seen[segment]))
        blocks.append(AttentionBlock(end - start, (*earlier, (segment, end))))
    return tuple(blocks)
