"""Softmax over a vocabulary that is split over ranks, for `logprob` and `linear_logprob`.

Rank r has the logits x of vocabulary rows r * v/tp up to (r + 1) * v/tp. For each token it computes, over its
own rows,
    m_r = max x    s_r = sum exp(x - m_r)    y_r = x of the label, or -inf if another rank owns it
    w_r = sum exp(x - m_r) (x - m_r)         (only for the entropy)
One all-gather exchanges these three or four numbers per token. With m = max_r m_r every rank then computes
    s = sum_r s_r exp(m_r - m)    logp = (max_r y_r - m) - log s
    entropy H = log s - sum_r (w_r + s_r (m_r - m)) exp(m_r - m) / s
Subtracting m before log s keeps the accuracy at logits of 1e4, where log-sum-exp itself has an ulp of 1e-3.
With p = exp((x - m) - log s), the gradient g of logp and the gradient e of H, each rank computes the gradient
of its logits without communication:
    dx = g ([column is the label] - p) - e p (log p + H)
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

GRADIENT_LAUNCH = {"BLOCK": 4096, "num_warps": 4}
_LOWEST = torch.finfo(torch.float32).min
_CPU_BLOCK = 2**22  # the torch implementation has so many logits in fp32 at a time, which take 16 MiB


@dataclass(frozen=True)
class VocabularyShard:
    """The vocabulary rows of this rank, and the implementation that computes with them."""

    rows: int  # v/tp including padding, the same on every rank
    valid_rows: int  # real rows, which come before the padding
    group: ProcessGroup | None  # the tensor-parallel ranks, in the order of their rows
    ignore_index: int
    impl: Literal["triton", "torch"]

    def __post_init__(self) -> None:
        if not 0 <= self.valid_rows <= self.rows:
            raise ValueError(f"valid_rows={self.valid_rows}: this shard has {self.rows} vocabulary rows")

    @property
    def group_size(self) -> int:
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    @property
    def first_row(self) -> int:
        return 0 if self.group is None else torch.distributed.get_rank(self.group) * self.rows


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums: float64 for float64, and fp32 for every other dtype."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def statistics_launch(element_size: int) -> dict[str, int]:
    """Launch settings of the statistics kernel. A program reads 16 KiB of a row at a time, in 16-byte loads.

    The size was chosen for many bytes in flight on a multiprocessor, from the number of registers that
    tests/kernels/test_compile.py reads from the binary. Twice the size would spill registers with fp32.
    """
    return {"STEPS": 16 // element_size, "LANES": 1024, "num_warps": 4}


def compute_statistics(logits: Tensor, labels: Tensor, out: Tensor, shard: VocabularyShard) -> None:
    """Write m_r, s_r and y_r of each token into `out`, and w_r if `out` has a fourth row.

    logits: [t, valid_rows or more], with a contiguous last dimension. labels: int64 [t], contiguous.
    out: [3 or 4, t], with a contiguous last dimension.
    """
    if not len(labels):
        return
    if shard.impl == "torch":
        return _torch_statistics(logits, labels, out, shard)
    from megatron_post_kernels.logprob_kernels import statistics_kernel

    with torch.cuda.device_of(logits):
        statistics_kernel[(len(labels),)](
            logits,
            labels,
            out,
            logits.stride(0),
            out.stride(0),
            shard.first_row,
            shard.ignore_index,
            COLUMNS=shard.valid_rows,
            WITH_ENTROPY=len(out) == 4,
            **statistics_launch(logits.element_size()),
        )


def combine_statistics(
    statistics: Tensor, labels: Tensor, shard: VocabularyShard
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Combine the statistics of all ranks, with the only collective of the softmax.

    statistics: [3 or 4, t] of this rank, with the same t on every rank. Returns logps [t], the entropy [t]
    (None without a fourth row) and the normalizers m and log s [2, t]. logps and entropy are 0 for ignored
    labels, and logps is -inf for a label outside the vocabulary.
    """
    gathered = statistics
    if shard.group_size > 1:
        gathered = statistics.new_empty(shard.group_size * len(statistics), len(labels))
        if len(labels):
            torch.distributed.all_gather_into_tensor(gathered, statistics, group=shard.group)
    gathered = gathered.view(shard.group_size, *statistics.shape)
    ignored = labels == shard.ignore_index
    maxima, totals, targets = gathered[:, 0], gathered[:, 1], gathered[:, 2]
    maximum = maxima.amax(0)
    shift = maxima - maximum
    scale = shift.exp()
    total = (totals * scale).sum(0)
    log_total = total.log()
    logps = (targets.amax(0) - maximum - log_total).masked_fill(ignored, 0.0)
    entropy = None
    if len(statistics) == 4:
        expected = ((gathered[:, 3] + totals * shift) * scale).sum(0) / total
        entropy = (log_total - expected).masked_fill(ignored, 0.0)
    return logps, entropy, torch.stack((maximum, log_total))


def write_gradient(
    logits: Tensor,
    labels: Tensor,
    normalizers: Tensor,
    logps_grad: Tensor,
    shard: VocabularyShard,
    *,
    entropy: Tensor | None = None,
    entropy_grad: Tensor | None = None,
) -> None:
    """Overwrite logits [t, rows] with their gradient. Padding and tokens without a gradient get zeros.

    labels: int64 [t]. normalizers: [2, t]. logps_grad, entropy, entropy_grad: [t]. Ignored labels may have
    any value there.
    """
    if not logits.numel():
        return
    logps_grad = logps_grad.contiguous()
    entropy_grad = None if entropy_grad is None else entropy_grad.contiguous()
    if shard.impl == "torch":
        return _torch_gradient(logits, labels, normalizers, logps_grad, entropy, entropy_grad, shard)
    from megatron_post_kernels.logprob_kernels import gradient_kernel

    tokens, columns = logits.shape
    blocks = -(-columns // GRADIENT_LAUNCH["BLOCK"])
    with torch.cuda.device_of(logits):
        gradient_kernel[(tokens * blocks,)](
            logits,
            labels,
            normalizers,
            logps_grad,
            entropy,
            entropy_grad,
            logits.stride(0),
            normalizers.stride(0),
            min(shard.valid_rows, columns),
            columns,
            shard.first_row,
            shard.ignore_index,
            WITH_ENTROPY=entropy is not None,
            **GRADIENT_LAUNCH,
        )
    # Autograd does not see that a kernel has overwritten the logits. With the new version it raises an error
    # if another operation still needs them, instead of using the gradient as if it were the logits.
    torch.autograd.graph.increment_version(logits)


def _torch_statistics(logits: Tensor, labels: Tensor, out: Tensor, shard: VocabularyShard) -> None:
    if shard.valid_rows == 0:
        out.zero_()
        out[0] = _LOWEST
        out[2] = -torch.inf
        return
    for block in _blocks(logits):
        x = logits[block, : shard.valid_rows].to(out.dtype)
        maximum = x.amax(1).clamp(min=_LOWEST)
        shifted = x - maximum[:, None]
        exponentials = shifted.exp()
        out[0, block] = maximum
        out[1, block] = exponentials.sum(1)
        owned, target = _targets(labels[block], shard)
        out[2, block] = x.gather(1, target[:, None])[:, 0].masked_fill(~owned, -torch.inf)
        if len(out) == 4:
            out[3, block] = torch.where(exponentials > 0, exponentials * shifted, 0.0).sum(1)


def _torch_gradient(
    logits: Tensor,
    labels: Tensor,
    normalizers: Tensor,
    logps_grad: Tensor,
    entropy: Tensor | None,
    entropy_grad: Tensor | None,
    shard: VocabularyShard,
) -> None:
    if shard.valid_rows == 0:
        logits.zero_()
        return
    for block in _blocks(logits):
        maximum, log_total = normalizers[:, block, None]
        trained = labels[block] != shard.ignore_index
        gradient = torch.where(trained, logps_grad[block], 0.0)
        pulled = gradient != 0
        logp = logits[block, : shard.valid_rows].to(normalizers.dtype) - maximum - log_total
        probability = logp.exp()
        result = -gradient[:, None] * probability
        owned, target = _targets(labels[block], shard)
        result.scatter_add_(1, target[:, None], torch.where(owned, gradient, 0.0)[:, None])
        if entropy is not None and entropy_grad is not None:
            token_grad = torch.where(trained, entropy_grad[block], 0.0)
            pulled |= token_grad != 0
            terms = torch.where(probability > 0, probability * (logp + entropy[block, None]), 0.0)
            result -= token_grad[:, None] * terms
        logits[block, : shard.valid_rows] = torch.where(pulled[:, None], result, 0.0).to(logits.dtype)
        logits[block, shard.valid_rows :] = 0


def _targets(labels: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Whether this rank owns each label, and the label's column. The column is arbitrary if it does not."""
    target = labels - shard.first_row
    owned = (target >= 0) & (target < shard.valid_rows) & (labels != shard.ignore_index)
    return owned, target.where(owned, 0)


def _blocks(logits: Tensor) -> list[slice]:
    tokens, columns = logits.shape
    size = max(1, _CPU_BLOCK // max(1, columns))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
