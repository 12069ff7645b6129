"""Supervised fine-tuning: cross-entropy on the trained roles, prompts masked."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from megatron_post.config.schema import RoleName
from megatron_post.data.batch import PackedBatch, next_in_segment, segment_positions
from megatron_post.data.store import Pack
from megatron_post.data.template import TokenRole
from megatron_post.losses.sft import sft_loss
from megatron_post.stages.base import Metrics


class SFT:
    """Trains the assistant's tokens: by default bodies and their terminators, for the model must learn to
    stop."""

    head: Literal["lm"] = "lm"
    needs_reference = False

    def __init__(self, trained_roles: Iterable[RoleName]) -> None:
        self._trained_roles = torch.tensor([int(TokenRole[name.upper()]) for name in trained_roles])

    def collate(self, pack: Pack) -> PackedBatch:
        # arrays from the loader, or tensors that are on the device already
        tokens, roles = torch.as_tensor(pack.tokens).long(), torch.as_tensor(pack.roles)
        cu_seqlens = torch.as_tensor(pack.cu_seqlens)
        label_roles = next_in_segment(roles, cu_seqlens, fill=int(TokenRole.PADDING))
        return PackedBatch(
            tokens=tokens,
            labels=next_in_segment(tokens, cu_seqlens, fill=0),
            trained=torch.isin(label_roles, self._trained_roles.to(roles.device)),
            positions=segment_positions(cu_seqlens),
            cu_seqlens=cu_seqlens,
            lengths=torch.as_tensor(pack.lengths, device=tokens.device),
        )

    def loss(self, output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Metrics]:
        """output: logps [t / cp] of the labels."""
        loss_sum, count = sft_loss(output, batch.trained)
        return loss_sum, count, {"loss": (loss_sum.detach(), count)}
