"""The scalar head that stands in place of the output layer."""

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RewardHead(MegatronModule):
    """One row of weights, the same on every tensor-parallel rank; scores are computed in fp32."""

    def __init__(self, config: TransformerConfig, *, tensor_group: Any) -> None:
        super().__init__(config=config)
        self._tensor_group = tensor_group
        weight = torch.empty(
            1, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        self.weight = torch.nn.Parameter(weight)
        # each rank sees its part of the sequence, and their gradients are summed like those of the norms
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [t (/ tp with SP), 1, h]. Returns scores fp32 [t]."""
        scores = hidden_states.float() @ self.weight.float().t()
        if self.config.sequence_parallel:
            # the loss is computed alike on all ranks: each takes its own part of the gradient
            scores = gather_from_sequence_parallel_region(
                scores, tensor_parallel_output_grad=False, group=self._tensor_group
            )
        return scores.flatten()
