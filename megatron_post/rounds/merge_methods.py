"""The arithmetic of averaging models, on float32 blocks of one tensor.

The delta of a model is its difference from the base. The papers call it task vector.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Above this cosine the angle is too small to divide by its sine. Other implementations of slerp use this
# value.
_PARALLEL = 0.9995
# The threshold is found by counting twice, first by the upper bits of the float32 pattern, then by the lower.
_LOWER_BITS = 16


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i / sum_i w_i."""
    total = math.fsum(weights)
    result = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        result.add_(tensor, alpha=weight / total)
    return result


def slerp_coefficients(dot: float, squares: tuple[float, float], share: float) -> tuple[float, float] | None:
    """The two factors of slerp, after K. Shoemake, "Animating rotation with quaternion curves" (1985).

    dot: the dot product of the tensors. squares: their squared lengths. share: the position on the arc, from
    0 to 1 at the second tensor. Returns None if the tensors are parallel or one is zero, since there is then
    no unique arc between them.
    """
    length = math.sqrt(squares[0]) * math.sqrt(squares[1])
    cosine = dot / length if length else 1.0
    if abs(cosine) > _PARALLEL:
        return None
    angle = math.acos(cosine)
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)


class MagnitudeThreshold:
    """The exact k-th largest absolute value of float32 numbers that are given in blocks.

    Call `count_upper` for all blocks, then `count_lower` for all blocks. The result does not depend on the
    cuts between blocks.
    """

    def __init__(self, kept: int) -> None:
        """kept: k, from 1 to the number of values."""
        self._left = kept
        self._upper = torch.zeros(2 ** (31 - _LOWER_BITS), dtype=torch.int64)
        self._lower = torch.zeros(2**_LOWER_BITS, dtype=torch.int64)
        self._bin = -1

    def count_upper(self, values: Tensor) -> None:
        self._upper += torch.bincount(_pattern(values) >> _LOWER_BITS, minlength=len(self._upper))

    def count_lower(self, values: Tensor) -> None:
        if self._bin < 0:
            self._bin, self._left = _descend(self._upper, self._left)
        pattern = _pattern(values)
        inside = pattern[pattern >> _LOWER_BITS == self._bin] & (2**_LOWER_BITS - 1)
        self._lower += torch.bincount(inside, minlength=len(self._lower))

    def value(self) -> float:
        lower, _ = _descend(self._lower, self._left)
        pattern = torch.tensor(self._bin << _LOWER_BITS | lower, dtype=torch.int32)
        return float(pattern.view(torch.float32))


def trim(delta: Tensor, threshold: float) -> Tensor:
    """The delta with 0 for values below the threshold. Values equal to the threshold stay."""
    if threshold == 0:
        return delta
    # Hardshrink also drops values equal to its bound.
    below = np.nextafter(np.float32(threshold), np.float32(0))
    return F.hardshrink(delta, float(below))


def kept_count(density: float, size: int) -> int:
    """The number of a tensor's values that a density keeps, which is at least one."""
    return max(1, int(density * size))


def dare_mask(key: str, start: int, count: int, *, density: float) -> Tensor:
    """A mask, bool [count], of the values that DARE keeps, beginning at a tensor's value number `start`.

    Each value is kept with probability `density`. Its random number comes from a counter-based generator
    (Philox) with the key `key`, so the mask does not depend on where blocks begin and end.
    """
    words = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], dtype=np.uint64)
    draws = np.random.Philox(key=words)
    draws.advance(start // 4)  # one step of the counter makes four numbers
    raw = draws.random_raw(start % 4 + count)[start % 4 :]
    return torch.from_numpy(raw < np.uint64(min(int(density * 2.0**64), 2**64 - 1)))


def elected_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(sum of w_i delta_i over the agreeing models, sum of their weights), separately for each value.

    The elected sign of a value is sign(sum_i w_i delta_i), or positive if the sum is 0. A model agrees if its
    delta has that sign, so a model with a delta of 0 never agrees. See P. Yadav et al., "TIES-Merging"
    (2023), section 4.
    """
    votes = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        votes.add_(delta, alpha=weight)
    elected = torch.where(votes >= 0, 1.0, -1.0)
    total, agreeing = torch.zeros_like(votes), torch.zeros_like(votes)
    for delta, weight in zip(deltas, weights, strict=True):
        along = delta * elected
        total.add_(along.clamp(min=0.0), alpha=weight)
        agreeing.add_(along > 0, alpha=weight)
    return total.mul_(elected), agreeing


def disjoint_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES' weighted mean over the models that agree with the elected sign, or 0 if none does."""
    total, agreeing = elected_sum(deltas, weights)
    return total / torch.where(agreeing == 0, 1.0, agreeing)


def _pattern(values: Tensor) -> Tensor:
    """The bit patterns of absolute values, int32 [n]. They have the same order as the values."""
    return values.reshape(-1).abs().view(torch.int32)


def _descend(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the rank-th largest value, and the value's rank inside that bin."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, rank))
    before = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before
