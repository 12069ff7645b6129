"""Log-probabilities from hidden states against float64, over dtypes, chunks, shards and frozen inputs."""

from typing import Any

import pytest
import torch
from megatron_post_kernels.implementation import Implementation
from megatron_post_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.interpreter import kernel_device, on_kernels
from tests.kernels.memory import AllocationTracker
from tests.ranks import run_ranks

IGNORED = -100
HIDDEN = 16
BOTH = pytest.mark.parametrize("impl", ["torch", "triton"])
# Logits lie within 4 and are rounded by half an ulp: 2^-7 in bf16, 2^-10 in fp16. Their gradients lie
# within 2, and the interpreter cuts them, by up to twice that. The gradients of hidden and weight are sums of
# these with factors of about 1/2: three ulps of 2 bound them all.
ERROR = {torch.float32: 5e-6, torch.float16: 3 * 2**-9, torch.bfloat16: 3 * 2**-6}


def _case(
    tokens: int, rows: int, dtype: torch.dtype, *, valid: int, hidden: int = HIDDEN
) -> dict[str, Tensor]:
    """Inputs in which every third label is ignored. Ignored gradients and padding rows are NaN."""
    generator = torch.Generator().manual_seed(tokens * rows)
    weight = torch.randn(rows, hidden, generator=generator).div(hidden**0.25)
    weight[valid:] = torch.nan
    labels = torch.randint(0, valid, (tokens,), generator=generator)
    gradient = torch.randn(tokens, generator=generator).clamp(-2, 2)
    labels[1::3] = IGNORED
    gradient[1::3] = torch.nan
    states = torch.randn(tokens, hidden, generator=generator).div(hidden**0.25)
    return {"hidden": states.to(dtype), "weight": weight.to(dtype), "labels": labels, "gradient": gradient}


def _results(case: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The logps, and the gradients of hidden and weight."""
    device = kernel_device()
    hidden, weight = (case[name].to(device).requires_grad_() for name in ("hidden", "weight"))
    logps = linear_logprob(hidden, weight, case["labels"].to(device), **settings)
    gradients = torch.autograd.grad(logps, (hidden, weight), case["gradient"].to(device, logps.dtype))
    return logps.detach().cpu(), gradients[0].cpu(), gradients[1].cpu()


def _expected(
    case: dict[str, Tensor], *, valid: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (case[name].to(dtype).requires_grad_() for name in ("hidden", "weight"))
    logps = linear_logprob_reference(hidden, weight, case["labels"], valid_rows=valid)
    gradient = torch.where(case["labels"] != IGNORED, case["gradient"].to(dtype), 0.0)
    clean = linear_logprob_reference(hidden, weight[:valid], case["labels"])
    gradients = torch.autograd.grad(clean, (hidden, weight), gradient)
    return logps.detach(), gradients[0], gradients[1]


def _assert_equal(dtype: torch.dtype, results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert [result.dtype for result in results] == [torch.float32, dtype, dtype]
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=0, atol=ERROR[dtype])


@on_kernels
@BOTH
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize(
    ("tokens", "rows", "valid", "chunk"),
    [(1, 9, 9, None), (7, 41, 41, 3), (7, 48, 41, None), (0, 9, 9, None)],
)
def test_against_float64(
    impl: str, dtype: torch.dtype, tokens: int, rows: int, valid: int, chunk: int | None
) -> None:
    case = _case(tokens, rows, dtype, valid=valid)
    results = _results(case, valid_rows=valid, chunk_tokens=chunk, impl=impl)
    _assert_equal(dtype, results, _expected(case, valid=valid))
    assert results[2][valid:].eq(0).all()


@on_kernels
@BOTH
def test_no_trained_token(impl: str) -> None:
    case = _case(5, 9, torch.float32, valid=9)
    case["labels"][:], case["gradient"][:] = IGNORED, torch.nan
    assert all(result.eq(0).all() for result in _results(case, impl=impl))


def test_the_number_of_chunks_does_not_matter() -> None:
    """Hidden's gradient is that of one chunk, bit for bit.

    The weight's gradient is summed in another order.
    """
    case = _case(50, 30, torch.float64, valid=30)
    whole = _results(case)
    for chunk in (1, 7, 50, 1000):
        for result, wanted in zip(_results(case, chunk_tokens=chunk), whole, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("chunk", "chunks"), [(8, 1), (4, 2), (2, 4)])
def test_the_last_chunk_is_not_computed_twice(chunk: int, chunks: int) -> None:
    """n chunks take (8 - 2/n) t v h operations.

    A second backward pass over the same forward takes 8 t v h.
    """
    case = _case(8, 10, torch.float32, valid=10)
    inputs = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    product = 2 * 8 * 10 * HIDDEN
    with FlopCounterMode(display=False) as counter:
        logps = linear_logprob(*inputs, case["labels"], chunk_tokens=chunk)
        first = torch.autograd.grad(logps, inputs, case["gradient"], retain_graph=True)
    assert counter.get_total_flops() == 4 * product - product // chunks
    with FlopCounterMode(display=False) as counter:
        second = torch.autograd.grad(logps, inputs, case["gradient"])
    assert counter.get_total_flops() == 3 * product
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_default_chunks() -> None:
    """512 MiB over 128,256 rows of bf16 are 2,093 tokens, rounded to 2,048.

    Chunks have equal sizes of 128 or more. An fp32 gradient of h 4,096 takes as much as 8,192 more tokens.
    """
    from megatron_post_kernels.linear_logprob import _chunk_tokens

    weight = torch.empty(128_256, 4096, dtype=torch.bfloat16, device="meta")
    assert [_chunk_tokens(tokens, weight) for tokens in (0, 100, 8192, 10_284)] == [1, 100, 8192, 10_284]
    assert _chunk_tokens(10_285, weight) == 1792  # six of them, and not five and some tokens
    assert _chunk_tokens(8192, weight.float()) == 1024  # its gradient needs no wider buffer
    assert _chunk_tokens(131_072, weight[: 128_256 // 8]) == 16_384
    assert _chunk_tokens(131_072, torch.empty(10**8, 1, device="meta")) == 128


def test_wide_accumulation_by_version() -> None:
    """torch 2.8 and 2.9 have the overload of addmm, but raise an error if bf16 products are added to fp32."""
    from megatron_post_kernels.linear_logprob import _accumulates_wider

    versions = ["2.6.0", "2.8.0+cu128", "2.9.1", "2.10.0a0+git1234", "2.10.0+cu130", "2.11.0+cu130", "2.13.0"]
    assert [_accumulates_wider(version) for version in versions] == [False] * 4 + [True] * 3


def test_gradcheck() -> None:
    case = _case(5, 7, torch.float64, valid=6)
    case["weight"].nan_to_num_(0.0)
    inputs = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    labels = case["labels"]
    assert torch.autograd.gradcheck(lambda x, w: linear_logprob_reference(x, w, labels, valid_rows=6), inputs)
    assert torch.autograd.gradcheck(
        lambda x, w: linear_logprob(x, w, labels, valid_rows=6, chunk_tokens=2), inputs
    )


@on_kernels
@BOTH
def test_weight_grad_accumulates(impl: Implementation) -> None:
    """Two microbatches are added in fp32, although the weight is bf16.

    Autograd gets no gradient of the weight.
    """
    case = _case(7, 12, torch.bfloat16, valid=10)
    device = kernel_device()
    weight = case["weight"].to(device).requires_grad_()
    main_grad = torch.ones(12, HIDDEN, device=device)
    for _ in range(2):
        logps = linear_logprob(
            case["hidden"].to(device),
            weight,
            case["labels"].to(device),
            valid_rows=10,
            chunk_tokens=2,
            weight_grad=main_grad,
            impl=impl,
        )
        logps.backward(case["gradient"].to(device))
    assert weight.grad is None
    expected = 1 + 2 * _expected(case, valid=10)[2]
    torch.testing.assert_close(main_grad.cpu().double(), expected, rtol=0, atol=2 * ERROR[torch.bfloat16])
    assert main_grad[10:].eq(1).all()


def test_one_chunk_makes_no_wider_gradient() -> None:
    """The only allocation of the weight's size is its gradient in bf16. There is no sum in fp32."""
    case = _case(8, 500, torch.bfloat16, valid=490, hidden=1024)
    inputs = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    with AllocationTracker() as tracker:
        logps = linear_logprob(*inputs, case["labels"], valid_rows=490)
        _, found = torch.autograd.grad(logps, inputs, case["gradient"])
    assert tracker.peak_bytes < 1.2 * case["weight"].nbytes
    expected = _expected(case, valid=490)[2]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ERROR[torch.bfloat16])
    assert found[490:].eq(0).all()


def test_frozen_weight() -> None:
    """Hidden's gradient and weight_grad do not change, and nothing of the weight's size is allocated."""
    case = _case(6, 400, torch.float32, valid=400)
    main_grad = torch.ones(400, HIDDEN)
    hidden = case["hidden"].requires_grad_()
    with AllocationTracker() as tracker:
        logps = linear_logprob(hidden, case["weight"], case["labels"], chunk_tokens=2, weight_grad=main_grad)
        logps.backward(case["gradient"])
    assert hidden.grad is not None
    torch.testing.assert_close(
        hidden.grad.double(), _expected(case, valid=400)[1], rtol=0, atol=ERROR[torch.float32]
    )
    assert main_grad.eq(1).all()
    assert tracker.largest == 2 * 400 < main_grad.numel()


def test_frozen_hidden() -> None:
    """The weight's gradient does not change, and nothing of hidden's size is allocated."""
    case = _case(60, 10, torch.float32, valid=10)
    weight = case["weight"].requires_grad_()
    with AllocationTracker() as tracker:
        logps = linear_logprob(case["hidden"], weight, case["labels"], chunk_tokens=4)
        logps.backward(case["gradient"])
    assert weight.grad is not None
    torch.testing.assert_close(
        weight.grad.double(), _expected(case, valid=10)[2], rtol=0, atol=ERROR[torch.float32]
    )
    assert tracker.largest < case["hidden"].numel()


def test_reference_pass_keeps_nothing() -> None:
    case = _case(6, 400, torch.float32, valid=400)
    with torch.no_grad(), AllocationTracker() as tracker:
        logps = linear_logprob(
            case["hidden"].requires_grad_(), case["weight"], case["labels"], chunk_tokens=2
        )
    assert logps.grad_fn is None
    torch.testing.assert_close(
        logps.double(), _expected(case, valid=400)[0], rtol=0, atol=ERROR[torch.float32]
    )
    assert tracker.largest == 2 * 400


def test_memory_is_flat_in_tokens() -> None:
    """No [t, v] is allocated.

    From 1,024 to 4,096 tokens, only hidden's gradient and some numbers per token are added. These are the
    label, statistics and normalizers, at most 20 fp32 at one time.
    """
    rows, hidden, chunk = 2048, 32, 128
    peaks = {}
    for tokens in (1024, 4096):
        case = _case(tokens, rows, torch.bfloat16, valid=rows, hidden=hidden)
        inputs = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
        with AllocationTracker() as tracker:
            logps = linear_logprob(*inputs, case["labels"], chunk_tokens=chunk)
            torch.autograd.grad(logps, inputs, case["gradient"])
        assert tracker.largest == chunk * rows < tokens * rows
        peaks[tokens] = tracker.peak_bytes
    slope = (peaks[4096] - peaks[1024]) / 3072
    assert 2 * hidden <= slope <= 2 * hidden + 20 * 4


def test_gradients_beat_eager_bf16() -> None:
    """Both gradients have smaller mean square errors against float64 than torch's own bf16."""
    case = _case(96, 1000, torch.bfloat16, valid=1000, hidden=64)
    expected = _expected(case, valid=1000)
    eager = _expected(case, valid=1000, dtype=torch.bfloat16)
    own = _results(case, chunk_tokens=7, impl="torch")
    for result, other, wanted in zip(own, eager, expected, strict=True):
        assert (result.double() - wanted).norm() <= (other.double() - wanted).norm()


def _sharded(dtype: torch.dtype, impl: str, tokens: int) -> None:
    """One rank with 12 rows of a weight with 30 real rows. Equals a single rank."""
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    valid = min(30, 12 * size)
    case = _case(tokens, 12 * size, dtype, valid=valid)
    logps, hidden_grad, weight_grad = _expected(case, valid=valid)
    rows = slice(12 * rank, 12 * rank + 12)
    results = _results(
        {**case, "weight": case["weight"][rows]},
        valid_rows=max(0, min(12, valid - 12 * rank)),
        group=torch.distributed.group.WORLD,
        chunk_tokens=3,
        impl=impl,
    )
    _assert_equal(dtype, results, (logps, hidden_grad, weight_grad[rows]))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("size", "tokens"), [(2, 8), (4, 8), (2, 0)])
def test_sharded_over_ranks(size: int, tokens: int) -> None:
    """With 4 ranks, half of the third shard and the whole fourth shard are padding."""
    run_ranks(_sharded, size, torch.float32, "torch", tokens)


@on_kernels
@pytest.mark.parametrize("size", [2, 4])
def test_sharded_kernels_over_ranks(size: int) -> None:
    if kernel_device() == "cuda":
        pytest.skip("gloo ranks hold their tensors on the CPU, in the interpreter")
    run_ranks(_sharded, size, torch.bfloat16, "triton", 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="max_memory_allocated needs a GPU")
@pytest.mark.parametrize("tokens", [8192, 32_768])
def test_memory_on_a_gpu(tokens: int) -> None:
    """Llama 3 8B needs at most 512 MiB and an fp32 copy of the weight beyond the gradients.

    This holds for any number of tokens. 64 MiB are for the numbers of each token and for fragmentation.
    """
    hidden = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.randn(128_256, 4096, dtype=torch.bfloat16, device="cuda").mul_(0.02).requires_grad_()
    main_grad = torch.zeros(weight.shape, device="cuda")
    labels = torch.randint(0, 128_256, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprob(hidden, weight, labels, weight_grad=main_grad).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before - hidden.numel() * 2
    assert extra <= 2**29 + 4 * weight.numel() + 2**26


def test_wrong_input_is_reported() -> None:
    hidden, weight, labels = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weight \[5, 2\]"):
        linear_logprob(hidden, weight[:, :2], labels)
    with pytest.raises(ValueError, match=r"labels \[3\]"):
        linear_logprob(hidden, weight, labels[:3])
    with pytest.raises(ValueError, match="int32"):
        linear_logprob(hidden, weight, labels.int())
    with pytest.raises(ValueError, match="bfloat16"):
        linear_logprob(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match="weight_grad"):
        linear_logprob(hidden, weight, labels, weight_grad=torch.zeros(5, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        linear_logprob(hidden, weight, labels, chunk_tokens=0)
    with pytest.raises(ValueError, match="valid_rows=6"):
        linear_logprob(hidden, weight, labels, valid_rows=6)
