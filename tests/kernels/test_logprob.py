"""Log-probability and entropy of given logits against float64, over dtypes, shapes, masks and shards."""

import math
from typing import Any

import pytest
import torch
from megatron_post_kernels.implementation import Implementation
from megatron_post_kernels.logprob import logprob, logprob_reference
from torch import Tensor

from tests.kernels.interpreter import kernel_device, on_kernels
from tests.kernels.memory import AllocationTracker
from tests.ranks import run_ranks

IGNORED = -100
BOTH = pytest.mark.parametrize("impl", ["torch", "triton"])
# Half an ulp of the largest gradient, about 2, plus fp32's own error. The interpreter cuts off what bf16
# cannot hold where a GPU rounds: a whole ulp.
GRADIENT_ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _case(tokens: int, columns: int, dtype: torch.dtype, *, valid: int) -> dict[str, Tensor]:
    """Random logits, labels and gradients. Every third label is ignored, and its gradient is NaN."""
    generator = torch.Generator().manual_seed(tokens * columns)
    logits = (3 * torch.randn(tokens, columns, generator=generator)).to(dtype)
    logits[:, valid:] = torch.nan
    labels = torch.randint(0, valid, (tokens,), generator=generator)
    gradients = torch.randn(2, tokens, generator=generator).clamp(-2, 2)
    labels[1::3] = IGNORED
    gradients[:, 1::3] = torch.nan
    return {"logits": logits, "labels": labels, "gradients": gradients}


def _results(case: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The logps, the entropy and the gradient of the logits."""
    logits = case["logits"].to(kernel_device()).requires_grad_()
    logps, entropy = logprob(logits * 1, case["labels"].to(kernel_device()), with_entropy=True, **settings)
    gradients = case["gradients"].to(kernel_device())
    (gradient,) = torch.autograd.grad((logps, entropy), logits, tuple(gradients))
    return logps.detach().cpu(), entropy.detach().cpu(), gradient.cpu()


def _expected(case: dict[str, Tensor], *, valid: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    logits = case["logits"].double().requires_grad_()
    outputs = logprob_reference(logits, case["labels"], valid_rows=valid)
    trained = case["labels"] != IGNORED
    gradients = torch.where(trained, case["gradients"].double(), 0.0)
    (gradient,) = torch.autograd.grad(outputs, logits, tuple(gradients))
    return outputs[0].detach(), outputs[1].detach(), gradient


def _assert_equal(case: dict[str, Tensor], results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """fp32 results agree within a few ulps of 16, the largest value.

    Gradients agree as their dtype allows.
    """
    for name, result, wanted in zip(("logps", "entropy"), results, expected, strict=False):
        assert result.dtype == torch.float32
        assert result.double().tolist() == pytest.approx(wanted.tolist(), rel=2e-6, abs=4e-6), name
    dtype = case["logits"].dtype
    assert results[2].dtype == dtype
    torch.testing.assert_close(results[2].double(), expected[2], rtol=0, atol=GRADIENT_ERROR[dtype])


@on_kernels
@BOTH
def test_worked_by_hand(impl: Implementation) -> None:
    """p = (1/4, 3/4): log 3/4 = -0.28768, entropy 1/4 log 4 + 3/4 log 4/3 = 0.56234, gradient (-1/4, 1/4).

    The second token has the same logits, and its label is ignored. It gives 0 and no gradient.
    """
    logits = torch.tensor([[0.0, math.log(3)]] * 2, device=kernel_device(), requires_grad=True)
    labels = torch.tensor([1, IGNORED], device=kernel_device())
    logps, entropy = logprob(logits * 1, labels, with_entropy=True, impl=impl)
    logps.sum().backward()
    assert logps.tolist() == pytest.approx([-0.28768, 0.0], abs=1e-5)
    assert entropy.tolist() == pytest.approx([0.56234, 0.0], abs=1e-5)
    assert logits.grad is not None
    assert logits.grad.tolist() == [pytest.approx([-0.25, 0.25], abs=1e-6), [0.0, 0.0]]


@on_kernels
@BOTH
@pytest.mark.parametrize("dtype", GRADIENT_ERROR, ids=str)
@pytest.mark.parametrize(("tokens", "columns", "valid"), [(1, 1, 1), (5, 37, 37), (4, 8500, 8301)])
def test_against_float64(
    impl: Implementation, dtype: torch.dtype, tokens: int, columns: int, valid: int
) -> None:
    """8,301 columns are a whole step and a partial step of the kernel's loop. Padding columns are NaN."""
    case = _case(tokens, columns, dtype, valid=valid)
    results = _results(case, valid_rows=valid, impl=impl)
    _assert_equal(case, results, _expected(case, valid=valid))
    assert results[2][:, valid:].eq(0).all()


@on_kernels
@BOTH
def test_extreme_logits(impl: Implementation) -> None:
    """Logits are +-1e4 and -inf. p is exactly 1, 1/2 or 0, and nothing is NaN.

    log-sum-exp in fp32 would have an error of 5e-4 at 1e4.
    """
    logits = torch.tensor(
        [
            [1e4, -1e4, 0.0, 1e4],
            [-1e4, -1e4, -1e4, -1e4 - math.log(2)],
            [-math.inf, 5.0, -math.inf, 5.0],
            [9999.0, 1e4, -math.inf, -math.inf],
        ]
    )
    labels = torch.tensor([0, 3, 1, 0])
    case = {"logits": logits, "labels": labels, "gradients": torch.ones(2, 4)}
    logps, entropy, gradient = _results(case, impl=impl)
    expected = [-math.log(2), -math.log(7), -math.log(2), -1 - math.log1p(math.exp(-1))]
    assert logps.tolist() == pytest.approx(expected, abs=3e-4)
    assert logps[[0, 2, 3]].tolist() == pytest.approx([expected[i] for i in (0, 2, 3)], abs=1e-6)
    assert entropy[[0, 2]].tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([0.5, 0.0, 0.0, -0.5], abs=1e-6)
    assert gradient.isfinite().all()


@on_kernels
@BOTH
def test_no_token_and_no_trained_token(impl: Implementation) -> None:
    empty = _results(_case(0, 10, torch.float32, valid=10), impl=impl)
    assert [result.shape for result in empty] == [(0,), (0,), (0, 10)]
    case = _case(3, 10, torch.float32, valid=10)
    case["labels"][:] = IGNORED
    case["gradients"][:] = torch.nan
    case["logits"][:] = torch.nan
    assert all(result.eq(0).all() for result in _results(case, impl=impl))


@on_kernels
@BOTH
def test_tokens_without_gradient_are_not_read(impl: Implementation) -> None:
    """An untrained prompt may have any logits. They are masked by a condition and not by a product with 0."""
    case = _case(3, 10, torch.float32, valid=10)
    case["labels"][:], case["gradients"][:] = 4, 0.0
    case["logits"][2] = torch.nan
    assert _results(case, impl=impl)[2].eq(0).all()


@on_kernels
@BOTH
def test_labels(impl: Implementation) -> None:
    """A label that no rank has gives -inf. Any value can be the ignored label, including 0."""
    logits = torch.zeros(4, 6, device=kernel_device())
    labels = torch.tensor([5, 4, -1, 0], device=kernel_device())
    logps = logprob(logits, labels, valid_rows=5, ignore_index=0, impl=impl)
    assert logps.tolist() == [-math.inf, pytest.approx(-math.log(5)), -math.inf, 0.0]


@on_kernels
@BOTH
def test_runs_are_bitwise_equal(impl: Implementation) -> None:
    case = _case(6, 3000, torch.bfloat16, valid=3000)
    for first, second in zip(_results(case, impl=impl), _results(case, impl=impl), strict=True):
        assert torch.equal(first, second)


@on_kernels
@BOTH
def test_gradient_takes_the_logits_place(impl: Implementation) -> None:
    """An operation that still needs the logits gets an error instead of the gradient."""
    device = kernel_device()
    source = torch.randn(3, 8, device=device, requires_grad=True)
    labels = torch.arange(3, device=device)
    logits = source * 1
    logps = logprob(logits, labels, impl=impl)
    (gradient,) = torch.autograd.grad(logps.sum(), logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()
    logits = source * 1
    squares = (logits * logits).sum()
    logprob(logits, labels, impl=impl).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_memory() -> None:
    """Beyond the logits there are 2 blocks of 2**22 fp32 and a few numbers per token, and no other [t, v]."""
    logits, labels = (
        torch.randn(512, 40_000, dtype=torch.bfloat16, requires_grad=True),
        torch.zeros(512).long(),
    )
    source = logits * 1
    with AllocationTracker() as tracker:
        torch.autograd.grad(logprob(source, labels).sum(), source)
    assert tracker.largest <= 2**22 < source.numel() // 4


def test_float64_and_gradcheck() -> None:
    """In float64 the torch implementation equals the reference to the last digits, and passes gradcheck."""
    case = _case(7, 19, torch.float64, valid=17)
    results = _results({**case, "gradients": case["gradients"].double()}, valid_rows=17)
    for result, expected in zip(results, _expected(case, valid=17), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    case = _case(4, 6, torch.float64, valid=6)
    logits = case["logits"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: logprob_reference(x, case["labels"]), logits)


def test_gradients_beat_eager_bf16() -> None:
    """The softmax in fp32, rounded once, has smaller errors against float64 than torch's own in bf16."""
    case = _case(64, 2000, torch.bfloat16, valid=2000)
    case["gradients"][1] = 0.0
    expected = _expected(case)[2]
    eager = case["logits"].clone().requires_grad_()
    logps, _ = logprob_reference(eager, case["labels"])
    logps.backward(torch.where(case["labels"] != IGNORED, case["gradients"][0], 0.0).to(torch.bfloat16))
    assert eager.grad is not None
    own = _results(case, impl="torch")[2]
    assert (own.double() - expected).norm() <= (eager.grad.double() - expected).norm()


def _sharded(dtype: torch.dtype, impl: Implementation) -> None:
    """One rank: its columns of logits that hold 30 real columns of 12 a rank. Equal to all on one rank.

    With 4 ranks the third shard is half padding and the fourth nothing else.
    """
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    valid = min(30, 12 * size)
    case = _case(7, 12 * size, dtype, valid=valid)
    expected = _expected(case, valid=valid)
    columns = slice(12 * rank, 12 * rank + 12)
    local = {**case, "logits": case["logits"][:, columns].contiguous()}
    own = max(0, min(12, valid - 12 * rank))
    results = _results(local, valid_rows=own, group=torch.distributed.group.WORLD, impl=impl)
    _assert_equal(local, results, (*expected[:2], expected[2][:, columns]))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_sharded_over_ranks(size: int) -> None:
    run_ranks(_sharded, size, torch.float32, "torch")


@on_kernels
@pytest.mark.parametrize("size", [2, 4])
def test_sharded_kernels_over_ranks(size: int) -> None:
    if kernel_device() == "cuda":
        pytest.skip("gloo ranks hold their tensors on the CPU, in the interpreter")
    run_ranks(_sharded, size, torch.bfloat16, "triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2^31 logits need a GPU")
def test_offsets_beyond_32_bits() -> None:
    """The last of 17,000 tokens x 128,256 columns has an offset above 2^31 elements."""
    logits = torch.zeros(17_000, 128_256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    logps = logprob(logits * 1, torch.full((17_000,), 128_255, device="cuda"))
    (gradient,) = torch.autograd.grad(logps[-1], logits)
    assert logps[-1].item() == pytest.approx(-math.log(128_256))
    assert gradient[-1, -1].item() == pytest.approx(1.0, abs=0.01)
    assert gradient[0].eq(0).all()


def test_wrong_input_is_reported() -> None:
    logits, labels = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="labels \\[2\\]"):
        logprob(logits, labels[:2])
    with pytest.raises(ValueError, match="int32"):
        logprob(logits, labels.int())
    with pytest.raises(ValueError, match="valid_rows=6: this shard has 5"):
        logprob(logits, labels, valid_rows=6)
    with pytest.raises(ValueError, match="strides"):
        logprob(torch.zeros(5, 3).T, labels)
    with pytest.raises(ValueError, match="tokens share memory"):
        logprob(torch.zeros(5).expand(3, 5), labels)
    with pytest.raises(ValueError, match="leaf"):
        logprob(logits.requires_grad_(), labels)
