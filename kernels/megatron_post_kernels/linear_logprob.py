"""Per-token log-probability directly from hidden states, without storing the logits of all tokens.

    logp_t = x_t[label_t] - log sum_i exp x_t[i],    x_t = W h_t

Tokens are processed in chunks. cuBLAS writes a chunk's logits into one buffer that all chunks share, and a
kernel computes their statistics (vocabulary_softmax.py has the equations). The forward pass ends with one
collective for all tokens. It keeps hidden, weight, two numbers per token and the buffer with the last chunk's
logits. The backward pass begins with that chunk and computes the logits of the others again. It overwrites
them with their gradient dx, and adds
    dh_t = W^T dx_t         dW = sum_t dx_t h_t^T   (in fp32 over several chunks)
With n chunks this takes (8 - 2/n) t v h floating-point operations. Keeping all logits takes 6 t v h and 2 t v
bytes of memory in bf16. All tokens are one chunk, and no multiplication is repeated, if their logits are not
larger than the logits of one of several chunks and the fp32 sum, which is the case for up to 10,284 tokens of
h 4,096 and v 128,256.
Shapes: t tokens, h hidden, v padded vocabulary, tp ranks.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.torch_version import TorchVersion

from megatron_post_kernels.implementation import Implementation, resolve
from megatron_post_kernels.logprob import logprob_reference
from megatron_post_kernels.vocabulary_softmax import (
    VocabularyShard,
    accumulation_dtype,
    combine_statistics,
    compute_statistics,
    write_gradient,
)

# Size of the logits of one of several chunks. They have enough rows to fill a GPU, and are small beside
# weights and gradients.
_CHUNK_BYTES = 512 * 2**20


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    valid_rows: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Log-probabilities [t] of hidden [t, h] and a whole weight [v, h], in plain torch and in their dtype."""
    logps, _ = logprob_reference(hidden @ weight.T, labels, valid_rows=valid_rows, ignore_index=ignore_index)
    return logps


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        shard: VocabularyShard,
        chunk_tokens: int,
        weight_grad: Tensor | None,
    ) -> Tensor:
        statistics = hidden.new_empty(3, len(labels), dtype=accumulation_dtype(hidden))
        chunks = _chunks(len(labels), chunk_tokens)
        buffer = _logits_buffer(hidden, weight, chunk_tokens, shard)
        for chunk in chunks:
            logits = _write_logits(buffer, hidden[chunk], weight, shard)
            compute_statistics(logits, labels[chunk], statistics[:, chunk], shard)
        logps, _, normalizers = combine_statistics(statistics, labels, shard)
        ctx.save_for_backward(hidden, weight, labels, normalizers)
        ctx.shard, ctx.chunk_tokens = shard, chunk_tokens
        ctx.weight_grad, ctx.buffer = weight_grad, buffer
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logps_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, normalizers = ctx.saved_tensors
        shard, weight_grad = ctx.shard, ctx.weight_grad
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        chunks = _chunks(len(labels), ctx.chunk_tokens)
        is_whole = weight_grad is None and len(chunks) == 1  # then one product is the weight's whole gradient
        if needs_weight and weight_grad is None:
            wide = accumulation_dtype(weight)
            weight_grad = torch.empty_like(weight) if is_whole else torch.zeros_like(weight, dtype=wide)
        # The gradient overwrites the buffer, so a second backward pass must compute all logits again.
        buffer, ctx.buffer = ctx.buffer, None
        written = buffer is not None
        if buffer is None:
            buffer = _logits_buffer(hidden, weight, ctx.chunk_tokens, shard)
        for chunk in reversed(chunks):
            logits = buffer[: chunk.stop - chunk.start]
            if not written:
                _write_logits(buffer, hidden[chunk], weight, shard)
            written = False
            write_gradient(logits, labels[chunk], normalizers[:, chunk], logps_grad[chunk], shard)
            if hidden_grad is not None:
                torch.mm(logits, weight[: shard.valid_rows], out=hidden_grad[chunk])
            if needs_weight and is_whole:
                torch.mm(logits.T, hidden[chunk], out=weight_grad[: shard.valid_rows])
                weight_grad[shard.valid_rows :].zero_()
            elif needs_weight:
                _add_product(weight_grad[: shard.valid_rows], logits.T, hidden[chunk])
        if hidden_grad is not None and shard.group_size > 1 and len(labels):
            torch.distributed.all_reduce(hidden_grad, group=shard.group)
        returned = weight_grad.to(weight.dtype) if needs_weight and ctx.weight_grad is None else None
        return hidden_grad, returned, None, None, None, None


def _chunks(tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens)]


def _logits_buffer(hidden: Tensor, weight: Tensor, chunk_tokens: int, shard: VocabularyShard) -> Tensor:
    """A buffer [at most chunk_tokens, valid_rows], whose rows are v/tp elements apart."""
    return hidden.new_empty(min(chunk_tokens, len(hidden)), len(weight))[:, : shard.valid_rows]


def _write_logits(buffer: Tensor, hidden: Tensor, weight: Tensor, shard: VocabularyShard) -> Tensor:
    return torch.mm(hidden, weight[: shard.valid_rows].T, out=buffer[: len(hidden)])


def _chunk_tokens(tokens: int, weight: Tensor) -> int:
    """All tokens if one chunk takes no more memory than several. Otherwise the tokens of equal chunks.

    Several chunks have `_CHUNK_BYTES` of logits, and if the weight is narrower than fp32 they also sum its
    gradient in an fp32 buffer. One chunk has neither that buffer nor a repeated multiplication. The tokens of
    several chunks are a multiple of 128, the tile of a matrix multiplication. The result depends on shapes
    and the dtype alone, so that a policy and its reference compute the same numbers. Padding rows count, so
    that every rank of a group has the same chunks.
    """
    row = max(1, len(weight)) * weight.element_size()
    is_narrow = weight.dtype != accumulation_dtype(weight)
    wide = weight.numel() * accumulation_dtype(weight).itemsize if is_narrow else 0
    if tokens <= max(128, (_CHUNK_BYTES + wide) // row):
        return max(1, tokens)
    most = max(128, _CHUNK_BYTES // row // 128 * 128)
    chunks = -(-tokens // most)
    return max(128, -(-tokens // (chunks * 128)) * 128)


def _accumulates_wider(torch_version: str) -> bool:
    """Whether addmm on CUDA can add a product of bf16 or fp16 to fp32.

    torch 2.8 and 2.9 also have the overload, but refuse fp32 (fixed by pytorch#167931).
    """
    return TorchVersion(torch_version) >= (2, 10)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, accumulated in the dtype of `out`, which may be wider than that of the factors."""
    if out.is_cuda and out.dtype != left.dtype and _accumulates_wider(torch.__version__):
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), out=out)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: ProcessGroup | None = None,
    valid_rows: int | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    weight_grad: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Log-probability of each label, in nats, without the logits [t, v/tp] of all tokens in memory.

    hidden: [t, h], identical on every rank of `group`. bf16, fp16 or fp32 (float64 with impl="torch"). Its
      gradient is summed over the ranks.
    weight: [v/tp, h] of hidden's dtype, this rank's vocabulary rows. labels: int64 [t], ids of the whole
    vocabulary, identical on every rank of `group`. group: tensor-parallel ranks in the order of their rows.
    Each has the same number of rows. All of them must
      call this function with the same settings.
    valid_rows: number of this shard's rows that are real. The rows after them are padding and are never read.
    chunk_tokens: number of tokens whose logits are in memory together. By default there is one chunk, unless
      its logits are larger than 512 MiB and an fp32 copy of a bf16 or fp16 weight. Then chunks are equal and
      have at most 512 MiB of logits (2,048 tokens of 128,256 rows in bf16). The last chunk's logits stay
      until the backward pass. Small chunks are slow, because each one reads the weight three times, and reads
      and writes the weight's gradient.
    weight_grad: fp32 [v/tp, h], such as Megatron's `main_grad`. The backward pass adds the weight's gradient
      to it, and autograd gets None for the weight. Without it, several chunks are summed in an fp32 buffer,
      which is rounded once to the weight's dtype, and the gradient of a single chunk is written in that
      dtype. It does not change if the weight is frozen.

    The gradient of a frozen weight or of a frozen hidden is neither computed nor allocated. Under
    `torch.no_grad` nothing is kept. Returns fp32 [t] (float64 for float64), with 0 for labels equal to
    `ignore_index` and -inf for a label that no rank has. The result is deterministic if the matrix
    multiplications are. The upstream gradients of ignored tokens may be NaN. Raises `ValueError` for shapes
    and types that do not fit.
    """
    shard = VocabularyShard(
        len(weight),
        len(weight) if valid_rows is None else valid_rows,
        group,
        ignore_index,
        resolve(impl, hidden),
    )
    if hidden.dim() != 2 or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(f"hidden {list(hidden.shape)}, weight {list(weight.shape)}: want [t, h], [v/tp, h]")
    if labels.shape != (len(hidden),) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels {list(labels.shape)} of {labels.dtype}: want int64 [{len(hidden)}], one for each hidden "
            "state"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: want one type")
    wanted = accumulation_dtype(weight)
    if weight_grad is not None and (weight_grad.shape != weight.shape or weight_grad.dtype != wanted):
        given = f"{list(weight_grad.shape)} of {weight_grad.dtype}"
        raise ValueError(f"weight_grad {given}: want {list(weight.shape)} of {wanted}")
    if chunk_tokens is None:
        chunk_tokens = _chunk_tokens(len(labels), weight)
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}: want at least 1")
    return _LinearLogprob.apply(hidden, weight, labels.contiguous(), shard, chunk_tokens, weight_grad)
