"""The share of right answers and its confidence interval."""

import math
from dataclasses import dataclass

_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Accuracy:
    """The number of right answers among `total`, by exact match."""

    correct: int
    total: int

    @property
    def share(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the share, after E. B. Wilson (1927), which also holds near 0 and 1."""
        n, z, share = self.total, _NORMAL_95, self.share
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.1f}% ({100 * low:.1f} to {100 * high:.1f})"
