"""The Llama: megatron-core's GPTModel whose output is per-token log-probabilities instead of a mean loss."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


class Llama(GPTModel):
    """GPTModel with our output. Log-probabilities of labels at the last pipeline stage, hidden states before
    it."""

    real_vocab_size: int
    scalar_head: bool = False

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor | None, **_: Any) -> Tensor:
        """hidden_states: [t (/ tp with SP), 1, h]; labels: int64 [1, t] or None.

        Returns logps fp32 [t] of the labels; without labels, the vocabulary-parallel logits [t, 1, v/tp];
        with a scalar head, the score fp32 [t] of every token.
        """
        if not self.post_process:
            return hidden_states
        if self.scalar_head:
            return self.output_layer(hidden_states)
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        logits, _ = self.output_layer(hidden_states, weight=weight)
        logits = self._without_padded_rows(logits)
        if labels is None:
            return logits
        return -vocab_parallel_cross_entropy(logits.float(), labels.t().contiguous()).squeeze(1)

    def _without_padded_rows(self, logits: Tensor) -> Tensor:
        """Padded vocabulary rows never receive probability, and hence no gradient. logits: [t, 1, v/tp]."""
        group = self.pg_collection.tp
        first = group.rank() * logits.shape[-1]
        real = min(max(self.real_vocab_size - first, 0), logits.shape[-1])
        if real == logits.shape[-1]:
            return logits
        padded = torch.arange(logits.shape[-1], device=logits.device) >= real
        return logits.masked_fill(padded, torch.finfo(logits.dtype).min)
