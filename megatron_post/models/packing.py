"""The description of a pack that every layer gets: segments, positions and the context-parallel split."""

from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_post.data.batch import PackedBatch, on_device
from megatron_post.parallel.context import ContextSplit


@dataclass(frozen=True)
class AttentionBlock:
    """The next `queries` tokens of this rank, which attend causally to the first tokens of some segments.

    Padding at the pack's end has no keys, and its output is 0.

    keys: (segment, number of its first tokens), in pack order. The causal mask is aligned at the lower right,
    so the last query attends to the last key. With context parallelism a rank has two blocks of each segment.
    A response with a shared prompt attends to the prompt's segment and to its own.
    """

    queries: int
    keys: tuple[tuple[int, int], ...]


@dataclass
class PackedSegments(PackedSeqParams):
    """`PackedSeqParams` of the portable layers.

    Its `qkv_format` is not "thd", because megatron-core would then use its own packed code, which needs
    Transformer Engine.

    positions: int64 [t / cp], positions of this rank's tokens in the text that they continue.
    indices: int64 [t / cp], indices of this rank's tokens in the pack.
    segments: int64 [t], the segment of every token of the pack. real: bool [t], False for padding.
    seen: int64 [n, 2], the range of earlier segments that each segment attends to besides itself.
    gather_order: int64 [t] or None, index of each token in the concatenation of all ranks' tokens.
    segment_lengths: tokens of each segment. blocks: the attention that this rank computes, in token order.
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
    """Packed parameters for the portable layers of a context-parallel rank.

    whole: the pack before its split, whose layout of segments is on the host.
    """
    starts = whole.cu_seqlens[:-1].long()
    within = torch.arange(len(whole.segments)) - starts[whole.segments]
    real = within < whole.lengths.long()[whole.segments]
    indices = split.indices(rank)
    moved = partial(on_device, device=device)
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
    """Packed parameters for Transformer Engine's attention, which splits `cu_seqlens` itself.

    cu_seqlens: int32, of the whole pack and on the host, so that the host never waits for the GPU.
    """
    longest = int(cu_seqlens.diff().max())
    cu_seqlens = on_device(cu_seqlens, device)
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
    blocks, padding = [], 0
    for segment, start, end in split.chunks(rank):
        if not real[segment]:
            padding += end - start
            continue
        # Only the real tokens of earlier segments are keys. Their padding lies between the prompt and the
        # response that continues it.
        earlier = tuple((other, real[other]) for other in range(*seen[segment]))
        blocks.append(AttentionBlock(end - start, (*earlier, (segment, end))))
    return (*blocks, AttentionBlock(padding, ())) if padding else tuple(blocks)
