"""One pack: the arrays that a store holds for it, and that every loader hands over."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_post.data.template import Rendered, TokenRole
from megatron_post.data.units import round_up


@dataclass(frozen=True, slots=True)
class Pack:
    """One pack of t tokens in n segments; a tail of padding is the last segment, with source and unit -1.

    tokens: int32 [t]; roles: uint8 [t], `TokenRole`; cu_seqlens: int32 [n + 1] from 0 to t; lengths: int32
    [n], real tokens of each segment; sources: int32 [n], index in `PackStore.sources`; sample_ids: uint64
    [n], row number in the source; unit_ids: int64 [n]; ranks: int32 [n], a preference's response's place, 0
    best, -1 elsewhere; reference_logps: float32 [t] of each token's successor, where they were asked for. The
    DALI backend hands over the first two on the GPU.
    """

    tokens: np.ndarray
    roles: np.ndarray
    cu_seqlens: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray
    sample_ids: np.ndarray
    unit_ids: np.ndarray
    ranks: np.ndarray
    reference_logps: np.ndarray | None = None


def pack_of_segments(
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
