"""The scalar head of a reward model, which replaces the output layer."""

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RewardHead(MegatronModule):
    """One row of weights, replicated on every tensor-parallel rank. Scores are computed in fp32.

    has_bias: whether a scalar is added to every score, as Hugging Face's token classification does.
    """

    def __init__(self, config: TransformerConfig, *, tensor_group: Any, has_bias: bool = False) -> None:
        super().__init__(config=config)
        self._tensor_group = tensor_group
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, **options))
        bias = torch.nn.Parameter(torch.empty(1, **options)) if has_bias else None
        self.register_parameter("bias", bias)
        for parameter in self.parameters():
            # With sequence parallelism each rank has a part of the sequence. This mark makes megatron-core
            # sum the ranks' gradients, as it does for norms.
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The score fp32 [t] of every token. hidden_states: [t (/ tp with SP), 1, h]."""
        scores = hidden_states.float() @ self.weight.float().t()
        if self.bias is not None:
            # The bias is added before the gather, so that each rank has its part of the gradient.
            scores = scores + self.bias.float()
        if self.config.sequence_parallel:
            # All tensor-parallel ranks compute the same loss. So the backward takes each rank's part of the
            # gradient. A reduce-scatter would count it once for every rank.
            scores = gather_from_sequence_parallel_region(
                scores, tensor_parallel_output_grad=False, group=self._tensor_group
            )
        return scores.flatten()
