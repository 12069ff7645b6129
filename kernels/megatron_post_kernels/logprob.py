"""Per-token log-probability and entropy from logits whose vocabulary may be split over ranks.

    logp_t = x_t[label_t] - log sum_i exp x_t[i]        H_t = - sum_i p_t[i] log p_t[i]

i runs over the real vocabulary rows of all ranks, never over padding. The equations of the sharded softmax
and of its gradient are in vocabulary_softmax.py. Shapes: t tokens, v padded vocabulary, tp ranks.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_post_kernels.implementation import Implementation, resolve
from megatron_post_kernels.vocabulary_softmax import (
    VocabularyShard,
    accumulation_dtype,
    combine_statistics,
    compute_statistics,
    write_gradient,
)


def logprob_reference(
    logits: Tensor, labels: Tensor, *, valid_rows: int | None = None, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [t] of whole logits [t, v], in plain torch and in the logits' dtype."""
    all_logps = logits[:, :valid_rows].log_softmax(-1)
    ignored = labels == ignore_index
    logps = all_logps.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    entropy = -(all_logps.exp() * all_logps).sum(-1)
    return logps.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, shard: VocabularyShard, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        statistics = logits.new_empty(4 if with_entropy else 3, len(labels), dtype=accumulation_dtype(logits))
        compute_statistics(logits, labels, statistics, shard)
        logps, entropy, normalizers = combine_statistics(statistics, labels, shard)
        ctx.save_for_backward(logits, labels, normalizers, entropy)
        ctx.shard = shard
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logps_grad: Tensor, entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, normalizers, entropy = ctx.saved_tensors
        write_gradient(
            logits, labels, normalizers, logps_grad, ctx.shard, entropy=entropy, entropy_grad=entropy_grad
        )
        return logits, None, None, None


@overload
def logprob(
    logits: Tensor,
    labels: Tensor,
    *,
    group: ProcessGroup | None = None,
    valid_rows: int | None = None,
    ignore_index: int = -100,
    with_entropy: Literal[False] = False,
    impl: Implementation = "auto",
) -> Tensor: ...


@overload
def logprob(
    logits: Tensor,
    labels: Tensor,
    *,
    group: ProcessGroup | None = None,
    valid_rows: int | None = None,
    ignore_index: int = -100,
    with_entropy: Literal[True],
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor]: ...


def logprob(
    logits: Tensor,
    labels: Tensor,
    *,
    group: ProcessGroup | None = None,
    valid_rows: int | None = None,
    ignore_index: int = -100,
    with_entropy: bool = False,
    impl: Implementation = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label, in nats.

    logits: [t, v/tp] of this rank, bf16, fp16 or fp32 (float64 with impl="torch"). **The backward pass
      overwrites them with their gradient**, so that there is no second [t, v/tp] in memory. They must be the
      output of an operation and have no other use. Autograd raises `RuntimeError` if another operation or a
      second backward pass still needs them.
    labels: int64 [t], ids of the whole vocabulary, identical on every rank of `group`.
    group: tensor-parallel ranks in the order of their vocabulary rows. Each has the same number of columns.
    valid_rows: number of this shard's vocabulary rows that are real. Columns after them are padding. They get
      no probability and no gradient, whatever values they have.
    with_entropy: also return the entropy of each token's distribution, which is differentiable.
    Returns fp32 [t] (float64 for float64), or two of them, with 0 for labels equal to `ignore_index`. A label
    that no rank has gives -inf. The result is deterministic, because sums have a fixed order.
    Raises `ValueError` for shapes and types that do not fit, and for logits that are a leaf of autograd.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {list(logits.shape)} and labels {list(labels.shape)}: want [t, v/tp], [t]")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}: want int64")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits' strides are {logits.stride()}: a token's logits must lie side by side")
    if abs(logits.stride(0)) < logits.shape[1] and len(logits) > 1:
        raise ValueError(
            f"logits' strides are {logits.stride()}: tokens share memory, pass logits.contiguous()"
        )
    if logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("logits are a leaf, and their gradient would overwrite them: pass logits.clone()")
    rows = logits.shape[1]
    valid_rows = rows if valid_rows is None else valid_rows
    shard = VocabularyShard(rows, valid_rows, group, ignore_index, resolve(impl, logits))
    logps, entropy = _Logprob.apply(logits, labels.contiguous(), shard, with_entropy)
    return (logps, entropy) if with_entropy else logps
