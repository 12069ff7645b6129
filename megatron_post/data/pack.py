"""`Pack`, the arrays of one pack. Stores read it and loaders yield it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_post.data.template import Rendered, TokenRole
from megatron_post.data.units import round_up


@dataclass(frozen=True, slots=True)
class Pack:
    """One pack of t tokens in n segments. Padding at the pack's end is further segments without real tokens.

    These last segments have the source and the unit -1. With the DALI backend `tokens` is a tensor on the
    GPU.
    """

    tokens: np.ndarray  # int32 [t]
    roles: np.ndarray  # uint8 [t], `TokenRole`
    cu_seqlens: np.ndarray  # int32 [n + 1], from 0 to t
    lengths: np.ndarray  # int32 [n], real tokens of each segment
    sources: np.ndarray  # int32 [n], index in `PackStore.sources`
    sample_ids: np.ndarray  # uint64 [n], row number in the source
    unit_ids: np.ndarray  # int64 [n], the same for all segments of a unit
    ranks: np.ndarray  # int32 [n], rank of a preference's response, 0 for the best, -1 for other segments
    reference_logps: np.ndarray | None = None  # float32 [t], of each token's successor, if they are needed


def tail_length(multiple: int) -> int:
    """Tokens of a segment of the padding at a pack's end.

    Attention kernels do not skip padding, and the cost of a causal segment grows with the square of its
    length. So these segments are as short as a tile of the kernels.
    """
    return round_up(128, multiple)


def tail_lengths(tail: int, multiple: int) -> list[int]:
    """Tokens of the segments into which `tail` tokens of padding at a pack's end are cut.

    multiple: that of the pack's other segments.
    """
    size = tail_length(multiple)
    return [size] * (tail // size) + [tail % size] * (tail % size > 0)


def pack_of_segments(
    segments: Sequence[Rendered], *, pack_length: int, segment_multiple: int = 1, pad_id: int = 0
) -> Pack:
    """A pack of consecutive segments, each padded to `segment_multiple`. The rest of the pack is padding.

    Each segment is a unit of its own, with rank -1. Raises `ValueError` if the segments do not fit.
    """
    padded = [round_up(len(segment), segment_multiple) for segment in segments]
    if sum(padded) > pack_length:
        raise ValueError(f"segments of {sum(padded)} tokens do not fit in a pack of {pack_length}")
    tail = tail_lengths(pack_length - sum(padded), segment_multiple)
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
