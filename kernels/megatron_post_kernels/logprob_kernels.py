"""Triton kernels of `logprob` and `linear_logprob`. This module is imported at the first launch.

A row is one token, and a column is one vocabulary row of this rank's shard. Offsets have 64 bits, because t *
v exceeds 2^31 at 16,745 tokens of Llama 3's vocabulary.
"""

import triton
from triton import language as tl

# The running maximum starts at the lowest finite fp32 and not at -inf, because -inf - -inf is NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    statistics,
    row_stride,
    statistics_stride,
    first_row,
    ignore_index,
    COLUMNS: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Statistics of one token's logits over COLUMNS. One program processes one token.

    These are the maximum, the sum of exp(x - maximum) and the target logit. With entropy there is also the
    sum of exp(x - maximum) (x - maximum).

    Each lane keeps its own running maximum and sum, and the lanes are combined once after the loop. So the
    loop has no barrier, and needs one exp to rescale for STEPS logits.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * row_stride
    statistics += row
    tile = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    maximum = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    # The statistics of an ignored token are never used, so its row is not read.
    if label != ignore_index:
        for start in range(0, COLUMNS, STEPS * LANES):
            column = start + tile
            x = tl.load(logits + column, mask=column < COLUMNS, other=float("-inf")).to(tl.float32)
            new_maximum = tl.maximum(maximum, tl.max(x, 0))
            shifted = x - new_maximum[None, :]
            exponential = tl.exp(shifted)
            shift = maximum - new_maximum
            scale = tl.exp(shift)
            if WITH_ENTROPY:
                terms = exponential * tl.where(exponential > 0, shifted, 0.0)
                weighted = (weighted + total * shift) * scale + tl.sum(terms, 0)
            total = total * scale + tl.sum(exponential, 0)
            maximum = new_maximum
    row_maximum = tl.max(maximum, 0)
    shift = maximum - row_maximum
    scale = tl.exp(shift)
    tl.store(statistics, row_maximum)
    tl.store(statistics + statistics_stride, tl.sum(total * scale, 0))
    target = label - first_row
    owned = (target >= 0) & (target < COLUMNS) & (label != ignore_index)
    target_logit = tl.load(logits + target, mask=owned, other=float("-inf")).to(tl.float32)
    tl.store(statistics + 2 * statistics_stride, target_logit)
    if WITH_ENTROPY:
        tl.store(statistics + 3 * statistics_stride, tl.sum((weighted + total * shift) * scale, 0))


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    normalizers,
    logps_grad,
    entropy,
    entropy_grad,
    row_stride,
    normalizers_stride,
    columns,
    all_columns,
    first_row,
    ignore_index,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite logits with their gradient. One program processes one block of one token's columns.

    Tokens without a gradient get zeros and are not read. The padding between `columns` and `all_columns` also
    gets zeros.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(all_columns, BLOCK)
    row = (program // blocks).to(tl.int64)
    label = tl.load(labels + row)
    trained = label != ignore_index
    # The upstream gradients of ignored tokens may be NaN.
    gradient = tl.load(logps_grad + row, mask=trained, other=0.0)
    pulled = gradient != 0
    if WITH_ENTROPY:
        token_entropy = tl.load(entropy + row)
        token_entropy_grad = tl.load(entropy_grad + row, mask=trained, other=0.0)
        pulled |= token_entropy_grad != 0
    maximum = tl.load(normalizers + row)
    log_total = tl.load(normalizers + normalizers_stride + row)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    logits += row * row_stride + column
    read = column < tl.where(pulled, columns, 0)
    x = tl.load(logits, mask=read, other=float("-inf")).to(tl.float32)
    logp = (x - maximum) - log_total
    probability = tl.exp(logp)
    target = (label - first_row).to(tl.int32)
    result = tl.where(column == target, gradient, 0.0) - gradient * probability
    if WITH_ENTROPY:
        terms = probability * tl.where(probability > 0, logp + token_entropy, 0.0)
        result -= token_entropy_grad * terms
    result = tl.where(read, result, 0.0)
    tl.store(logits, result.to(logits.dtype.element_ty), mask=column < all_columns)
