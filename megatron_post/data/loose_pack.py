"""A pack made in memory, for scoring and checking: the same `Pack` that a store gives."""

from collections.abc import Sequence

import numpy as np

from megatron_post.data.store import Pack
from megatron_post.data.template import Rendered, TokenRole
from megatron_post.data.units import round_up


def loose_pack(
    segments: Sequence[Rendered], *, pack_length: int, segment_multiple: int = 1, pad_id: int = 0
) -> Pack:
    """Segments side by side, each padded to `segment_multiple`, and a tail of padding up to `pack_length`.

    Each segment is a unit of its own, with rank -1. Raises `ValueError` where they do not fit.
    """
    padded = [round_up(len(segment), segment_multiple) for segment in segments]
    if sum(padded) > pack_length:
        raise ValueError(f"segments of {sum(padded)} tokens do not fit in a pack of {pack_length}")
    tail = [pack_length - sum(padded)] if sum(padded) < pack_length else []
    cu_seqlens = np.cumsum([0, *padded, *tail], dtype=np.int32)
    tokens = np.full(pack_length, pad_id, dtype=np.int32)
    roles = np.full(pack_length, TokenRole.PADDING, dtype=np.uint8)
    for start, segment in zip(cu_seqlens.tolist(), segments, strict=False):
        tokens[start : start + len(segment)] = segment.tokens
        roles[start : start + len(segment)] = segment.roles
    lengths = np.array([*(len(segment) for segment in segments), *(0 for _ in tail)], dtype=np.int32)
    numbers = np.array([*range(len(segments)), *(-1 for _ in tail)], dtype=np.int64)
    return Pack(
        tokens=tokens,
        roles=roles,
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        sources=np.minimum(numbers, 0).astype(np.int32),
        sample_ids=np.maximum(numbers, 0).astype(np.uint64),
        unit_ids=numbers,
        ranks=np.full(len(lengths), -1, dtype=np.int32),
    )
