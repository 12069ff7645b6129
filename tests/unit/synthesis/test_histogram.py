"""Intervals are round, and each value is in the interval that its label names."""

import random
from collections import Counter

import pytest

from megatron_post.synthesis.histogram import histogram
from megatron_post.synthesis.summary import Measure


def test_whole_numbers_by_hand() -> None:
    """6 to 66 need 13 bars with a width of 5. A bar of 5 numbers ends one number before the next bar."""
    found = histogram({6.0: 1, 9.0: 2, 10.0: 4, 66.0: 8})
    assert (found.first, found.width, found.counts) == (5, 5, (3, 4, *[0] * 10, 8))
    assert (found.labels[0], found.labels[-1]) == ("5 to 9", "65 to 69")
    assert [text for _, text in found.ticks] == ["5", "20", "35", "50", "65"]
    few = histogram({1.0: 3, 3.0: 5, 5.0: 3})
    assert few.counts == (3, 0, 5, 0, 3) and few.labels == ["1", "2", "3", "4", "5"]
    assert few.ticks == [((place + 0.5) / 5, str(place + 1)) for place in range(5)]
    assert histogram({7.0: 2}).counts == (2,) and histogram({7.0: 2}).labels == ["7"]
    assert histogram({0.0: 1, 131072.0: 1}).labels[-1] == "130,000 to 139,999"


def test_decimals_by_hand() -> None:
    """0.69 is below 0.7. 0.29 * 100 is 28.999999999999996, and stays in the interval of 0.29."""
    found = histogram({0.0: 1, 0.29: 2, 0.3: 4, 0.69: 8})
    assert (found.first, found.width) == (0, 0.05)
    assert found.counts == (1, 0, 0, 0, 0, 2, 4, 0, 0, 0, 0, 0, 0, 8)
    assert (found.labels[5], found.labels[-1]) == ("0.25 to 0.3", "0.65 to 0.7")
    assert found.ticks[0] == (0, "0") and found.ticks[2] == (6 / 14, "0.3")
    assert histogram({-1.5: 1, 0.25: 1}).labels[0] == "-1.5 to -1.4"


@pytest.mark.parametrize("decimals", [0, 2])
def test_each_value_is_in_its_interval(decimals: int) -> None:
    draw = random.Random(0)
    for _ in range(300):
        size = 10 ** draw.uniform(0, 5)
        values = Counter(round(draw.uniform(-size, size), decimals) for _ in range(draw.randint(1, 30)))
        found = histogram(values)
        assert len(found.counts) <= 20 and sum(found.counts) == values.total()
        assert found.counts[0] and found.counts[-1] and len(found.labels) == len(found.counts)
        for place, count in enumerate(found.counts):
            low = round(found.first + place * found.width, 2)
            high = round(found.first + (place + 1) * found.width, 2)
            assert count == sum(number for value, number in values.items() if low <= value < high)
        assert 1 <= len(found.ticks) <= 6 and all(0 <= position <= 1 for position, _ in found.ticks)


def test_values_are_rounded_down() -> None:
    """A value below 0.7 is not shown at 0.7."""
    measure = Measure()
    for value in (0.6999, 0.29, 5, 1.1 + 2.2):
        measure.add(value)
    assert measure.counts == {0.69: 1, 0.29: 1, 5.0: 1, 3.3: 1}
