"""The Llama: megatron-core's GPTModel whose output is per-token log-probabilities instead of a mean loss."""

from typing import Any, Literal

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron_post_kernels.linear_logprob import linear_logprob
from megatron_post_kernels.logprob import logprob
from torch import Tensor


class Llama(GPTModel):
    """GPTModel with our output. Log-probabilities of labels at the last pipeline stage, hidden states before
    it."""

    real_vocab_size: int
    scalar_head: bool = False
    loss_impl: Literal["fused", "unfused"] = "fused"

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor | None, **_: Any) -> Tensor:
        """hidden_states: [t (/ tp with SP), 1, h]; labels: int64 [1, t] or None.

        Returns logps fp32 [t] of the labels, which "fused" computes without ever holding the logits of all
        tokens; without labels, the vocabulary-parallel logits [t, 1, v/tp]; with a scalar head, the score
        fp32 [t] of every token.
        """
        if not self.post_process:
            return hidden_states
        if self.scalar_head:
            return self.output_layer(hidden_states)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        if labels is not None and self.loss_impl == "fused":
            return linear_logprob(
                hidden_states.squeeze(1),
                weight,
                labels.flatten(),
                group=self.pg_collection.tp,
                valid_rows=self._real_rows,
                sequence_parallel=self.config.sequence_parallel,
            )
        logits, _ = self.output_layer(hidden_states, weight=weight)
        if labels is not None:
            return logprob(
                logits.squeeze(1), labels.flatten(), group=self.pg_collection.tp, valid_rows=self._real_rows
            )
        padded = torch.arange(logits.shape[-1], device=logits.device) >= self._real_rows
        return logits.masked_fill(padded, torch.finfo(logits.dtype).min)

    @property
    def _real_rows(self) -> int:
        """This rank's vocabulary rows that are no padding: only they receive probability, and gradient."""
        group, rows = self.pg_collection.tp, self.vocab_size // self.pg_collection.tp.size()
        return min(max(self.real_vocab_size - group.rank() * rows, 0), rows)
