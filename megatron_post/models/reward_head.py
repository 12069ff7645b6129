"""The scalar head of a reward model, which replaces the output layer."""

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RewardHead(MegatronModule):
    """One row of weights, replicated on every tensor-parallel rank. Scores are computed in fp32."""

    def __init__(self, config: TransformerConfig, *, tensor_group: Any) -> None:
        super().__init__(config=config)
        self._tensor_group = tensor_group
        weight = torch.empty(
            1, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        self.weight = torch.nn.Parameter(weight)
        # With sequence parallelism each rank has a part of the sequence. This mark makes megatron-core sum
        # the ranks' gradients, as it does for norms.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The score fp32 [t] of every token. hidden_states: [t (/ tp with SP), 1, h]."""
        scores = hidden_states.float() @ self.weight.float().t()
        if self.config.sequence_parallel:
            # All tensor-parallel ranks compute the same loss. So the backward takes each rank's part of the
            # gradient. A reduce-scatter would count it once for every rank.
            scores = gather_from_sequence_parallel_region(
                scores, tensor_parallel_output_grad=False, group=self._tensor_group
            )
        return scores.flatten()
