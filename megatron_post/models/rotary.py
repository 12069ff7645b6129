"""Rotary embeddings from each token's position, with Llama 3.1's frequency scaling."""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_post.config.sections import Model
from megatron_post.models.packing import PackedSegments


def inverse_frequencies(model: Model) -> Tensor:
    """Rotary frequencies fp32 [head_dim / 2], with Llama 3.1's scaling.

    Wavelengths above original / low_freq_factor are stretched by `factor`, and those below
    original / high_freq_factor are kept. Wavelengths between the two are interpolated.
    """
    dim = model.head_dim
    frequencies = 1.0 / (model.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * torch.pi / frequencies
    original = scaling.original_max_position_embeddings
    smooth = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


class PositionRotary(RotaryEmbedding):
    """megatron-core's rotary module, which uses each token's own position if it gets `PackedSegments`.

    GPTModel calls `get_rotary_seq_len` and passes the result to `forward`. With the portable layers the
    result is the tensor of positions. With Transformer Engine it is a length, as megatron-core expects.
    """

    def __init__(self, model: Model, *, device: torch.device, context_group: Any) -> None:
        super().__init__(
            model.head_dim,
            1.0,
            rotary_base=int(model.rope_theta),
            use_cpu_initialization=True,
            cp_group=context_group,
        )
        self.inv_freq = inverse_frequencies(model).to(device)

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> Any:
        """Positions int64 [t / cp] of the portable layers' tokens, or else the longest segment's length.

        The length is rounded up to a power of two. megatron-core caches the angles of the last 32 lengths,
        and those of 128K tokens take 64 MiB.
        """
        packed = args[4] if len(args) > 4 else kwargs.get("packed_seq_params")
        if isinstance(packed, PackedSegments):
            return packed.positions
        longest: int = super().get_rotary_seq_len(*args, **kwargs)
        return 1 << (longest - 1).bit_length()

    def forward(self, positions_or_length: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Angles fp32 [t / cp, 1, 1, head_dim], or [length, 1, 1, head_dim] for Transformer Engine."""
        if not isinstance(positions_or_length, Tensor):
            return super().forward(positions_or_length, *args, **kwargs)
        angles = torch.outer(positions_or_length.float(), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
