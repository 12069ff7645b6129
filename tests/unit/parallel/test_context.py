"""The zigzag split, worked out by hand."""

import pytest
import torch

from megatron_post.parallel.context import ContextSplit


def test_split_by_hand() -> None:
    """Segments of 4 and 8 tokens over 2 ranks have chunks of 1 and 2 tokens.

    Rank 0 has chunks 0 and 3 of each segment, and rank 1 has chunks 1 and 2.
    """
    cu_seqlens = torch.tensor([0, 4, 12])
    split = ContextSplit(cu_seqlens, 2)
    assert split.indices(0).tolist() == [0, 3, 4, 5, 10, 11]
    assert split.indices(1).tolist() == [1, 2, 6, 7, 8, 9]
    assert split.order.tolist() == [0, 6, 7, 1, 2, 3, 8, 9, 10, 11, 4, 5]
    assert list(split.chunks(0)) == [(0, 0, 1), (0, 3, 4), (1, 0, 2), (1, 6, 8)]
    assert list(split.chunks(1)) == [(0, 1, 2), (0, 2, 3), (1, 2, 4), (1, 4, 6)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gathering_restores_the_pack(size: int) -> None:
    cu_seqlens = torch.tensor([0, 8, 24, 64])
    values = torch.randn(64)
    split = ContextSplit(cu_seqlens, size)
    gathered = torch.cat([values[split.indices(rank)] for rank in range(size)])
    assert torch.equal(gathered[split.order], values)
    for rank in range(size):
        spans = [
            (cu_seqlens[segment] + start, cu_seqlens[segment] + end)
            for segment, start, end in split.chunks(rank)
        ]
        assert split.indices(rank).tolist() == [i for start, end in spans for i in range(start, end)]


def test_a_segment_that_cannot_be_divided_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a segment of 6 tokens .* multiple of 4"):
        ContextSplit(torch.tensor([0, 4, 10]), 2)
