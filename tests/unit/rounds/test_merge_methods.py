"""The arithmetic of averaging is compared with hand calculations."""

import math
from itertools import pairwise

import pytest
import torch

from megatron_post.rounds.merge_methods import (
    MagnitudeThreshold,
    dare_mask,
    disjoint_mean,
    elected_sum,
    slerp_coefficients,
    weighted_mean,
)


def _threshold(values: torch.Tensor, kept: int, *, block: int) -> float:
    search = MagnitudeThreshold(kept)
    for count in (search.count_upper, search.count_lower):
        for part in values.split(block):
            count(part)
    return search.value()


def test_weighted_mean() -> None:
    """(1 x 2 + 3 x 6) / 4 = 5."""
    assert weighted_mean([torch.tensor([2.0]), torch.tensor([6.0])], [1.0, 3.0]).tolist() == [5.0]


def test_ties_by_hand() -> None:
    """Two models have the weight 1 and the base 0. Each is trimmed to the two largest of four deltas.

    model 1: [ 4, -1,  3, 0.5]  trimmed: [ 4, 0, 3, 0]
    model 2: [-6,  2,  1, 0.5]  trimmed: [-6, 2, 0, 0]
    votes (sums):                        [-2, 2, 3, 0]   elected: - + + +
    For value 1 only model 2 agrees, which gives -6. For value 2 only model 2 agrees, because 0 never agrees,
    which gives 2. For value 3 only model 1 agrees, which gives 3. For value 4 no model agrees, which gives 0.
    With weights 2 and 1 the first vote is 8 - 6 = 2. Then the positive sign wins, and only model 1 counts,
    which gives 4.
    """
    deltas = [torch.tensor([4.0, -1, 3, 0.5]), torch.tensor([-6.0, 2, 1, 0.5])]
    trimmed = []
    for delta, expected in zip(deltas, (3.0, 2.0), strict=True):
        threshold = _threshold(delta, 2, block=3)
        assert threshold == expected
        trimmed.append(torch.where(delta.abs() < threshold, 0.0, delta))
    assert disjoint_mean(trimmed, [1.0, 1.0]).tolist() == [-6.0, 2.0, 3.0, 0.0]
    assert disjoint_mean(trimmed, [2.0, 1.0]).tolist() == [4.0, 2.0, 3.0, 0.0]
    # both models agree, so the weighted mean is (2 x 4 + 1 x 1) / 3
    assert disjoint_mean([torch.tensor([4.0]), torch.tensor([1.0])], [2.0, 1.0]).tolist() == [3.0]


def test_elected_sum_keeps_the_weights_of_those_that_agree() -> None:
    """For 3 and -1 with weights 1 and 2, the vote is 1. Only the first model agrees, and its weight is 1."""
    total, agreeing = elected_sum([torch.tensor([3.0]), torch.tensor([-1.0])], [1.0, 2.0])
    assert (total.item(), agreeing.item()) == (3.0, 1.0)


@pytest.mark.parametrize("kept", [1, 2, 7, 500, 999, 1000])
def test_threshold_is_the_kth_magnitude(kept: int) -> None:
    """It equals the result of a sort for zeros, equal values, subnormals and both signs, with any blocks."""
    torch.manual_seed(0)
    values = torch.randn(1000) * 10.0 ** torch.randint(-42, 30, (1000,))
    values[:50], values[50:60] = 0.0, -3.0
    expected = values.abs().sort(descending=True).values[kept - 1].item()
    assert _threshold(values, kept, block=1000) == _threshold(values, kept, block=37) == expected


def test_slerp_by_hand() -> None:
    """Half way over a right angle the factors are sin 45 / sin 90 = 0.7071, so that the length stays 1.

    A third of the way over 60 degrees they are sin 40 / sin 60 and sin 20 / sin 60.
    """
    half = slerp_coefficients(0.0, (1.0, 1.0), 0.5)
    assert half == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    third = slerp_coefficients(0.5 * 2 * 3, (4.0, 9.0), 1 / 3)
    degree = math.pi / 180
    assert third == pytest.approx(
        (math.sin(40 * degree) / math.sin(60 * degree), math.sin(20 * degree) / math.sin(60 * degree))
    )
    assert slerp_coefficients(1.0, (1.0, 1.0), 0.5) is None  # parallel
    assert slerp_coefficients(-1.0, (1.0, 1.0), 0.5) is None  # opposite
    assert slerp_coefficients(0.0, (0.0, 1.0), 0.5) is None  # no direction


def test_dare_mask_is_independent_of_blocks() -> None:
    whole = dare_mask("7/0/name", 0, 10_000, density=0.3)
    cuts = [0, 1, 6, 13, 4096, 4099, 10_000]
    parts = [dare_mask("7/0/name", a, b - a, density=0.3) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    # a binomial distribution gives 3000 +- 4 standard deviations of sqrt(10000 x 0.3 x 0.7) = 46
    assert abs(int(whole.sum()) - 3000) < 184
    other = dare_mask("7/1/name", 0, 10_000, density=0.3)
    # independent masks both keep 0.09 of 10,000, +- 4 standard deviations of sqrt(10000 x 0.09 x 0.91) = 29
    assert abs(int((whole & other).sum()) - 900) < 115
    assert dare_mask("a", 0, 100, density=1.0).all()
