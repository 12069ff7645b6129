"""A histogram of numbers with round intervals, which the report of a run shows."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

_MOST_BARS = 20
_MOST_TICKS = 6


@dataclass(frozen=True)
class Histogram:
    """counts: of equal intervals. first: lower end of the first one. width: of an interval.

    An interval contains its lower end, but not its upper end. is_whole: whether all values are whole numbers.
    """

    counts: tuple[int, ...]
    first: float
    width: float
    is_whole: bool

    @property
    def labels(self) -> list[str]:
        """The values of each bar, as "6", "6 to 10" or "0.1 to 0.15"."""
        last = 1 if self.is_whole else 0  # an interval of whole numbers ends before the next one
        ends = ((self._end(place), self._end(place + 1) - last) for place in range(len(self.counts)))
        return [_text(low) if low == high else f"{_text(low)} to {_text(high)}" for low, high in ends]

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Positions along the axis from 0 to 1, and their numbers.

        They are at the ends of bars, and at the centres of bars of one whole number.
        """
        bars = len(self.counts)
        if self.is_whole and self.width == 1:
            places = range(0, bars, -(-bars // _MOST_TICKS))
            return [((place + 0.5) / bars, _text(self._end(place))) for place in places]
        places = range(0, bars + 1, -(-bars // (_MOST_TICKS - 1)))
        return [(place / bars, _text(self._end(place))) for place in places]

    def _end(self, place: int) -> float:
        return round(self.first + place * self.width, 2)


def histogram(counts: Mapping[float, int]) -> Histogram:
    """counts: how often each value comes, with at most two decimals.

    The width is 1, 2 or 5 times a power of ten, and 1 or more for whole numbers.
    """
    hundredths = {round(value * 100): number for value, number in counts.items()}  # exact arithmetic
    is_whole = all(value % 100 == 0 for value in hundredths)
    low, high = min(hundredths), max(hundredths)
    widths = (factor * 10**power for power in count(2 if is_whole else 0) for factor in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < _MOST_BARS)
    found = [0] * (high // width - low // width + 1)
    for value, number in hundredths.items():
        found[value // width - low // width] += number
    return Histogram(tuple(found), low // width * width / 100, width / 100, is_whole)


def _text(number: float) -> str:
    return f"{number:,.10g}"
