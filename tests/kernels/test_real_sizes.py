"""The log-probability kernels at the sizes of Llama 3 405B on 8 tensor-parallel ranks: strides and widths.

The interpreter runs a grid slowly, so the tests have three tokens, which lie as far apart as those of a long
pack. Memory between them is reserved and never touched.
"""

import torch
from megatron_post_kernels.linear_logprob import linear_logprob
from megatron_post_kernels.vocabulary_softmax import (
    VocabularyShard,
    combine_statistics,
    compute_statistics,
    write_gradient,
)

from tests.kernels.interpreter import kernel_device, on_kernels

COLUMNS, HIDDEN, TENSOR = 128_256 // 8, 16_384, 8
FAR = 2**30 + 16  # elements from token to token, so that the last of three begins after 2^31
ERROR = 3 * 2**-6  # in bf16, as tests/kernels/test_linear_logprob.py works it out


class _LastShard(VocabularyShard):
    """The last of 8 shards, without a process group."""

    @property
    def first_row(self) -> int:
        return (TENSOR - 1) * self.rows


@on_kernels
def test_offsets_beyond_32_bits() -> None:
    """One label is another rank's, one is ignored and one is in this shard.

    Memory beside a row is unchanged.
    """
    generator = torch.Generator().manual_seed(0)
    device = kernel_device()
    rows = torch.randn(3, COLUMNS, generator=generator).to(device, torch.bfloat16)
    storage = torch.empty(2 * FAR + COLUMNS + 16, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((3, COLUMNS), (FAR, 1), 8)
    beside = torch.tensor([[start + 7, start + 8 + COLUMNS] for start in (0, FAR, 2 * FAR)], device=device)
    logits.copy_(rows)
    storage[beside] = 7.0
    labels = torch.tensor([3, -100, (TENSOR - 1) * COLUMNS + 5], device=device)
    gradient = torch.tensor([-1.0, torch.nan, 0.5], device=device)

    shard = _LastShard(COLUMNS, COLUMNS, None, -100, "triton")
    statistics = torch.empty(3, 3, device=device)
    compute_statistics(logits, labels, statistics, shard)
    logps, _, normalizers = combine_statistics(statistics, labels, shard)
    write_gradient(logits, labels, normalizers, gradient, shard)

    # fp32 sums of 16,032 terms in lanes of 16 have about 20 roundings of 6e-8.
    expected = rows.double().log_softmax(1)
    torch.testing.assert_close(logps[2].double(), expected[2, 5], rtol=0, atol=1e-5)
    assert logps[0] == -torch.inf and logps[1] == 0
    wanted = -gradient[::2, None].double() * expected[::2].exp()
    wanted[1, 5] += 0.5
    # Results are rounded to bf16, or truncated by the interpreter, with an error of at most one ulp.
    torch.testing.assert_close(logits[::2].double(), wanted, rtol=2**-7, atol=1e-9)
    assert logits[1].eq(0).all() and storage[beside].eq(7.0).all()


@on_kernels
def test_a_whole_shard() -> None:
    """Hidden states have 16,384 values, and the weight has 16,032 rows, which repeat 501 rows 32 times.

    So each probability is 1/32 of that over the 501 rows, and float64 is cheap.
    """
    generator = torch.Generator().manual_seed(1)
    device, few = kernel_device(), COLUMNS // 32
    hidden = torch.randn(3, HIDDEN, generator=generator).div(HIDDEN**0.25).to(device, torch.bfloat16)
    block = torch.randn(few, HIDDEN, generator=generator).div(HIDDEN**0.25).to(device, torch.bfloat16)
    weight = block.repeat(32, 1)
    labels = torch.tensor([2, -100, COLUMNS - 1], device=device)
    gradient = torch.tensor([1.0, torch.nan, -2.0], device=device)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    logps = linear_logprob(*inputs, labels, impl="triton")
    hidden_grad, weight_grad = torch.autograd.grad(logps, inputs, gradient)

    exact, kept = block.double(), hidden.detach().double()[::2]
    share = (kept @ exact.T).log_softmax(1) - torch.tensor(32.0).log()
    own = torch.tensor([2, few - 1], device=device)  # the labels among the 501
    torch.testing.assert_close(logps[::2].double(), share.gather(1, own[:, None])[:, 0], rtol=0, atol=ERROR)
    pull = gradient[::2, None].double()
    mean = 32 * share.exp() @ exact
    wanted = pull * (exact[own] - mean)
    torch.testing.assert_close(hidden_grad[::2].double(), wanted, rtol=0, atol=ERROR)
    assert hidden_grad[1].eq(0).all()
    for row in (0, 2, 501 * 20 + 2, COLUMNS - 1):
        pulled = (labels[::2] == row).double() - share[:, row % few].exp()
        expected = (pull[:, 0] * pulled) @ kept
        torch.testing.assert_close(weight_grad[row].double(), expected, rtol=0, atol=ERROR)
