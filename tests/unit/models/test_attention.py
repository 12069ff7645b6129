"""Packed attention is compared with a dense mask in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from megatron_post.data.batch import PackedBatch, segment_numbers
from megatron_post.data.pack import pack_of_segments
from megatron_post.data.template import Rendered
from megatron_post.models import attention
from megatron_post.models.attention import block_attention, flex_attention
from megatron_post.models.packing import PackedSegments, portable_segments, transformer_engine_segments
from megatron_post.parallel.context import ContextSplit

CU_SEQLENS = torch.tensor([0, 4, 24, 32, 64], dtype=torch.int32)


# The last two segments are responses to the second one, which has 3 tokens of padding.
SEEN = torch.tensor([[0, 0], [0, 0], [1, 2], [1, 2]])
LENGTHS = torch.tensor([4, 17, 6, 32], dtype=torch.int32)


def _packed(
    rank: int, size: int, *, shared_prompt: bool, more: int = 0, real: Tensor | None = None
) -> PackedSegments:
    """This rank's part of a pack.

    more: number of responses of 4 tokens that are cut from the last one. real: the real tokens of segments.
    """
    cuts = torch.arange(64 - 4 * more, 64, 4, dtype=torch.int32)
    cu_seqlens = torch.cat([CU_SEQLENS[:-1], cuts, CU_SEQLENS[-1:]])
    lengths = torch.cat([LENGTHS[:-1], cu_seqlens.diff()[3:]]) if real is None else real
    seen = torch.cat([SEEN, SEEN[-1:].expand(more, 2)])
    nothing, segments = torch.zeros(64, dtype=torch.long), segment_numbers(cu_seqlens)
    batch = PackedBatch(
        tokens=nothing,
        labels=nothing,
        trained=nothing.bool(),
        positions=torch.arange(64) - cu_seqlens[segments],
        segments=segments,
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        seen=seen if shared_prompt else None,
    )
    split = ContextSplit(cu_seqlens, size)
    return portable_segments(batch, split, rank=rank, device=torch.device("cpu"))


def _tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (4, 2, 2)  # grouped queries
    q, k, v = (torch.randn(n, 64, 8, generator=generator, dtype=torch.float64).to(dtype) for n in heads)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def _dense(q: Tensor, k: Tensor, v: Tensor, *, scale: float, shared_prompt: bool) -> Tensor:
    segment = torch.repeat_interleave(torch.arange(4), CU_SEQLENS.diff().long())
    index = torch.arange(64)
    allowed = (segment[:, None] == segment[None]) & (index[None] <= index[:, None])
    if shared_prompt:
        allowed[24:, 4 : 4 + 17] = True
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("shared_prompt", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_blocks_equal_a_dense_mask(size: int, shared_prompt: bool) -> None:
    """Each context-parallel rank's output is exact, and the ranks' gradients add up to the dense gradient."""
    q, k, v = _tensors(torch.float64)
    expected = _dense(q, k, v, scale=0.3, shared_prompt=shared_prompt)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    total = [torch.zeros_like(g) for g in wanted]
    for rank in range(size):
        packed = _packed(rank, size, shared_prompt=shared_prompt)
        output = block_attention(q[:, packed.indices], k, v, packed, scale=0.3)
        torch.testing.assert_close(output, expected[:, packed.indices], rtol=0, atol=1e-12)
        parts = torch.autograd.grad((output * weights[:, packed.indices]).sum(), (q, k, v))
        for sum_, part in zip(total, parts, strict=True):
            sum_ += part
    for sum_, gradient in zip(total, wanted, strict=True):
        torch.testing.assert_close(sum_, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2])
def test_padding_is_skipped(size: int) -> None:
    """The last segments are padding. Their output is 0, and that of the others is what it was."""
    q, k, v = (x.detach() for x in _tensors(torch.float64))
    for rank in range(size):
        plain = _packed(rank, size, shared_prompt=False, more=2)
        padded = _packed(rank, size, shared_prompt=False, more=2, real=torch.tensor([4, 17, 6, 0, 0, 0]))
        expected = block_attention(q[:, plain.indices], k, v, plain, scale=0.3)
        output = block_attention(q[:, padded.indices], k, v, padded, scale=0.3)
        is_padding = padded.segments[padded.indices] >= 3
        assert is_padding.sum() == 32 // size and output[:, is_padding].eq(0).all()
        assert torch.equal(output[:, ~is_padding], expected[:, ~is_padding])
        assert len(padded.blocks) == 3 * (1 if size == 1 else 2) + 1


def test_a_short_tail_does_not_lengthen_the_longest_segment() -> None:
    """Transformer Engine gets padding as short segments, so a pack's longest segment is a real one."""
    pack = pack_of_segments(
        [Rendered(np.ones(40, np.int32), np.ones(40, np.uint8))], pack_length=2048, segment_multiple=8
    )
    cu_seqlens = torch.as_tensor(pack.cu_seqlens)
    packed = transformer_engine_segments(cu_seqlens, context_size=4, device=torch.device("cpu"))
    assert packed.max_seqlen_q == 128 and packed.cu_seqlens_q.tolist() == pack.cu_seqlens.tolist()
    assert (cu_seqlens.diff() % 8 == 0).all()


@pytest.mark.parametrize("shared_prompt", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_flex_equals_blocks(size: int, shared_prompt: bool) -> None:
    """The GPU's block mask allows the same pairs as the blocks.

    FlexAttention's own reference runs here in fp32, so the tolerance is 1e-5.
    """
    q, k, v = (x.detach() for x in _tensors(torch.float32))
    for rank in range(size):
        packed = _packed(rank, size, shared_prompt=shared_prompt)
        local = q[:, packed.indices]
        expected = block_attention(local, k, v, packed, scale=0.3)
        torch.testing.assert_close(
            flex_attention(local, k, v, packed, scale=0.3), expected, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("lengths", [(130, 7, 200), (1, 127, 129, 44)])
def test_flex_equals_blocks_over_several_tiles(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    """Outputs and gradients agree. Neither the pack nor its segments are multiples of a tile's width, 128.

    FlexAttention refuses gradients on a CPU, although its plain implementation can compute them.
    """
    from torch.nn.attention import flex_attention as module

    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    segments, total = segment_numbers(cu_seqlens), sum(lengths)
    nothing = torch.zeros(total, dtype=torch.long)
    batch = PackedBatch(
        tokens=nothing,
        labels=nothing,
        trained=nothing.bool(),
        positions=torch.arange(total) - cu_seqlens[segments],
        segments=segments,
        cu_seqlens=cu_seqlens,
        lengths=cu_seqlens.diff(),
        seen=None,
    )
    packed = portable_segments(batch, ContextSplit(batch.cu_seqlens, 1), rank=0, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (torch.randn(n, total, 8, generator=generator) for n in (4, 2, 2, 4))
    found = []
    for attend in (flex_attention, block_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        output = attend(*inputs, packed, scale=0.3)
        found.append([output, *torch.autograd.grad((output * weights).sum(), inputs)])
    for flex, blocks in zip(*found, strict=True):
        torch.testing.assert_close(flex, blocks, rtol=0, atol=1e-5)


def test_flex_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packs have one length and 4 to 10 segments.

    If the mask's shapes depended on the number of segments, each number would be compiled. After 8
    compilations torch gives up, and FlexAttention would then hold all scores of the pack in memory.
    """
    kernel, counter = attention._flex_kernel(False), CompileCounter()
    compiled = torch.compile(kernel, dynamic=False, backend=counter)
    monkeypatch.setattr(attention, "_flex_kernel", lambda compiled_for_gpu: compiled)
    q, k, v = (x.detach() for x in _tensors(torch.float32))
    for more in range(7):
        packed = _packed(0, 1, shared_prompt=True, more=more)
        expected = block_attention(q, k, v, packed, scale=0.3)
        torch.testing.assert_close(flex_attention(q, k, v, packed, scale=0.3), expected, rtol=0, atol=1e-5)
    assert counter.frame_count == 1
