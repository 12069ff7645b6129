"""The zigzag split, by hand."""

import pytest
import torch

from megatron_post.parallel.context import gathered_order, zigzag_indices


def test_by_hand() -> None:
    """Segments of 4 and 8 over 2 ranks: chunks of 1 and 2. Rank 0 holds chunks 0 and 3 of each, rank 1 chunks
    1, 2."""
    cu_seqlens = torch.tensor([0, 4, 12])
    assert zigzag_indices(cu_seqlens, rank=0, size=2).tolist() == [0, 3, 4, 5, 10, 11]
    assert zigzag_indices(cu_seqlens, rank=1, size=2).tolist() == [1, 2, 6, 7, 8, 9]
    assert gathered_order(cu_seqlens, size=2).tolist() == [0, 6, 7, 1, 2, 3, 8, 9, 10, 11, 4, 5]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gathering_restores_the_pack(size: int) -> None:
    cu_seqlens = torch.tensor([0, 8, 24, 64])
    values = torch.randn(64)
    gathered = torch.cat([values[zigzag_indices(cu_seqlens, rank=r, size=size)] for r in range(size)])
    assert torch.equal(gathered[gathered_order(cu_seqlens, size=size)], values)


def test_a_segment_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"a segment of 6 tokens .* multiple of 4"):
        zigzag_indices(torch.tensor([0, 4, 10]), rank=0, size=2)
