"""Llama: megatron-core's GPTModel with per-token log-probabilities as its output instead of a mean loss."""

from typing import Any, Literal

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron_post_kernels.linear_logprob import linear_logprob
from megatron_post_kernels.logprob import logprob
from torch import Tensor

from megatron_post.parallel.selection import Selection


class OutputLayer(ColumnParallelLinear):
    """megatron-core's output layer, which can also compute log-probabilities.

    They are computed in `forward` for the sake of `optimizer.overlap`. Data parallelism waits for the
    all-gather of a weight just before the module that holds it is called. Elsewhere the weight could be
    stale.

    fuse_wgrad_accumulation: add the weight's gradient to data parallelism's fp32 buffer in the backward pass,
    as Transformer Engine's layers do. Tied weights get theirs through autograd, which adds the embedding's.
    """

    fuse_wgrad_accumulation: bool = False

    def forward(
        self,
        hidden_states: Tensor,
        weight: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        trained: Selection | None = None,
        valid_rows: int = 0,
    ) -> Tensor:
        """Returns logps fp32 [t] of the labels, or the logits [t, 1, v/tp] if there are no labels.

        hidden_states: [t (/ tp with SP), 1, h]. weight: that of tied embeddings. labels: int64 [t]. trained:
        the tokens whose logps are computed. The logps of the others are 0. With labels the logits of all
        tokens are never in memory together.
        """
        if labels is None:
            logits: Tensor = super().forward(hidden_states, weight)[0]
            return logits
        assert trained is not None
        main_grad = None
        if weight is None:
            own: Any = self.weight
            weight = own
            if self.fuse_wgrad_accumulation and own.requires_grad and torch.is_grad_enabled():
                main_grad, weight = own.main_grad, _AddedToMainGrad.apply(own)
        logps = linear_logprob(
            trained.rows(hidden_states.squeeze(1), self.tp_group),
            weight,
            labels[trained.tokens],
            group=self.tp_group,
            valid_rows=valid_rows,
            weight_grad=main_grad,
        )
        return logps.new_zeros(len(labels)).index_copy(0, trained.tokens, logps)


class _AddedToMainGrad(torch.autograd.Function):
    """The weight itself. Its backward pass reports that `main_grad` already has the gradient.

    megatron-core's hook then adds nothing. With `optimizer.overlap` the hook still requires a gradient, so
    autograd gets a tensor whose values are never read.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor:
        assert gradient is None
        ctx.weight.grad_added_to_main_grad = True
        return torch.empty_like(ctx.weight)


class Llama(GPTModel):
    """GPTModel whose last pipeline stage returns the labels' log-probabilities, or scores."""

    real_vocab_size: int
    scalar_head: bool = False
    scores_steps: bool = False
    loss_impl: Literal["fused", "unfused"] = "fused"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            # GPTModel does not let its caller choose this layer's class. OutputLayer has the same attributes.
            self.output_layer.__class__ = OutputLayer

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Tensor | None, loss_mask: Selection | None = None, **_: Any
    ) -> Tensor:
        """Compute the output from hidden_states [t (/ tp with SP), 1, h]. labels: int64 [1, t] or None.

        With labels this returns their logps fp32 [t]. The loss "fused" computes those of the tokens in
        `loss_mask` and never has the logits of all tokens in memory. GPTModel passes this argument through.
        Without labels this returns the vocabulary-parallel logits [t, 1, v/tp], and with a scalar head the
        score fp32 [t] of every token.
        """
        if not self.post_process:
            return hidden_states
        if self.scalar_head:
            return self.output_layer(hidden_states)
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        rows = self._real_rows
        if labels is not None and self.loss_impl == "fused":
            return self.output_layer(
                hidden_states, tied, labels=labels.flatten(), trained=loss_mask, valid_rows=rows
            )
        logits = self.output_layer(hidden_states, tied)
        if labels is not None:
            return logprob(logits.squeeze(1), labels.flatten(), group=self.pg_collection.tp, valid_rows=rows)
        padded = torch.arange(logits.shape[-1], device=logits.device) >= rows
        return logits.masked_fill(padded, torch.finfo(logits.dtype).min)

    @property
    def _real_rows(self) -> int:
        """Number of this rank's vocabulary rows without padding. Only these get probability and gradient."""
        group, rows = self.pg_collection.tp, self.vocab_size // self.pg_collection.tp.size()
        return min(max(self.real_vocab_size - group.rank() * rows, 0), rows)
