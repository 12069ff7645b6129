"""The microbatch that the model gets, which is one pack as tensors."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_post.data.pack import Pack
from megatron_post.data.template import TokenRole


@dataclass(frozen=True)
class PackedBatch:
    """One pack of t tokens in n segments, or a context-parallel rank's part of it.

    A whole pack is on the host, because the layout of its segments and the number of its trained tokens are
    read there. Its tokens and labels may already be on a GPU, if the loader copied them ahead.

    Per-token fields are `[t]` for the whole pack and `[t / cp]` after `part`. The other fields always
    describe the whole pack. A token's label is its successor in the same segment, or 1 for a right step and 0
    for a wrong one. `trained` marks the labels that carry loss. Segment k sees itself and the real tokens of
    earlier segments, from segment `seen[k, 0]` to below `seen[k, 1]`. So responses that share a prompt see
    the prompt's segment. If `seen` is None, each segment sees only itself.
    """

    tokens: Tensor  # int64
    labels: Tensor  # int64, 0 for a token without a label
    trained: Tensor  # bool
    positions: Tensor  # int64, from 0 in each segment, or from the end of the segment that it continues
    segments: Tensor  # int64, the index of the token's segment
    cu_seqlens: Tensor  # int32 [n + 1]
    lengths: Tensor  # int32 [n], real tokens of each segment
    seen: Tensor | None = None  # int64 [n, 2]
    comparisons: "Comparisons | None" = None
    reference_logps: Tensor | None = None  # float32, log-probabilities of labels under the reference policy

    def part(self, indices: Tensor) -> "PackedBatch":
        """The tokens at `indices` (int64), in that order."""
        values = {name: getattr(self, name) for name in _PER_TOKEN if getattr(self, name) is not None}
        return dataclasses.replace(
            self, **{name: value[on_device(indices, value.device)] for name, value in values.items()}
        )

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on a device. The host does not wait for the copies."""
        return moved(self, device)


@dataclass(frozen=True)
class Comparisons:
    """The p pairs of responses of e examples that are compared in a pack.

    Every example has the total weight 1. An example of three responses gives three pairs of weight 1/3.
    """

    better: Tensor  # int64 [p], segment of the better response
    worse: Tensor  # int64 [p], segment of the worse response
    weights: Tensor  # float32 [p], 1 / the number of pairs of the pair's example, so that they sum to e
    ranks: Tensor  # int64 [p, 2], ranks of better and worse
    examples: Tensor  # int64 [], the number e


_PER_TOKEN = ("tokens", "labels", "trained", "positions", "segments", "reference_logps")


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """The same values on a device. The host does not wait for the copy.

    A GPU copies pageable memory only after all its earlier work, and the host would wait for that. torch does
    not use pinned memory again before the copy has run.
    """
    if values.device.type == "cpu" and device.type != "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def moved(value: Any, device: torch.device) -> Any:
    """`value` on a device. It is a tensor, or a dataclass that holds tensors and such dataclasses."""
    if isinstance(value, Tensor):
        return on_device(value, device)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    names = [field.name for field in dataclasses.fields(value)]
    return dataclasses.replace(value, **{name: moved(getattr(value, name), device) for name in names})


def batch_of_pack(pack: Pack, trained_roles: Tensor) -> PackedBatch:
    """Tensors of a whole pack. `trained` marks labels of the given roles (int64 [k], of `TokenRole`)."""
    # Tokens are an array, or a tensor on the device to which the loader copied them ahead.
    tokens, roles = torch.as_tensor(pack.tokens).long(), torch.as_tensor(pack.roles)
    cu_seqlens = torch.as_tensor(pack.cu_seqlens)
    label_roles = _next_in_segment(roles, cu_seqlens, fill=int(TokenRole.PADDING))
    segments = segment_numbers(cu_seqlens)
    reference = pack.reference_logps
    return PackedBatch(
        tokens=tokens,
        labels=_next_in_segment(tokens, cu_seqlens, fill=0),
        trained=torch.isin(label_roles, trained_roles),
        positions=torch.arange(len(tokens)) - cu_seqlens[:-1].long()[segments],
        segments=segments,
        cu_seqlens=cu_seqlens,
        lengths=torch.as_tensor(pack.lengths),
        reference_logps=None if reference is None else torch.as_tensor(reference),
    )


def role_numbers(names: Iterable[str]) -> Tensor:
    """`TokenRole` numbers of roles that are named as in the config, int64 [k]."""
    return torch.tensor([int(TokenRole[name.upper()]) for name in names], dtype=torch.long)


def segment_numbers(cu_seqlens: Tensor) -> Tensor:
    """The index of each token's segment, int64 [t]. cu_seqlens: int [n + 1], on the host."""
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths, output_size=int(cu_seqlens[-1]))


def _next_in_segment(values: Tensor, cu_seqlens: Tensor, *, fill: int) -> Tensor:
    """Each token's successor in its own segment, and `fill` at a segment's last token.

    values: [t], on any device. cu_seqlens: int [n + 1], on the host. Returns [t].
    """
    successors = torch.roll(values, -1)
    successors[on_device(cu_seqlens[1:].long() - 1, values.device)] = fill
    return successors
