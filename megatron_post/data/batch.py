"""A microbatch on its way to the model: one pack, as tensors."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """One pack of t tokens in n segments, or a context-parallel rank's part of it.

    Per-token fields are `[t]` for the whole pack and `[t / cp]` after `part`; `cu_seqlens` always describes
    the whole. A token's label is its successor in the same segment; `trained` marks the labels that carry
    loss.
    """

    tokens: Tensor  # int64
    labels: Tensor  # int64, 0 where there is none
    trained: Tensor  # bool
    positions: Tensor  # int64, from 0 in each segment
    cu_seqlens: Tensor  # int32 [n + 1]

    def part(self, indices: Tensor) -> "PackedBatch":
        """The tokens at `indices` (int64), in that order."""
        names = ("tokens", "labels", "trained", "positions")
        return dataclasses.replace(self, **{name: getattr(self, name)[indices] for name in names})

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on a device, copied without waiting where the memory is pinned."""
        fields = {
            f.name: getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)
        }
        return dataclasses.replace(self, **fields)


def segment_positions(cu_seqlens: Tensor) -> Tensor:
    """Positions that restart at 0 in each segment. cu_seqlens: int [n + 1]; returns int64 [t]."""
    total = int(cu_seqlens[-1])
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long(), output_size=total)
    return torch.arange(total, device=starts.device) - starts


def next_in_segment(values: Tensor, cu_seqlens: Tensor, *, fill: int) -> Tensor:
    """Each token's successor in its own segment, `fill` at a segment's last token. values: [t]; returns
    [t]."""
    successors = torch.roll(values, -1)
    successors[cu_seqlens[1:].long() - 1] = fill
    return successors
