"""Ranges of elements are cut into rectangles."""

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_post.train.shards import rectangles


def test_rectangles_by_hand() -> None:
    """Elements 2 to 9 of a 3 x 4 matrix are two elements of row 0, the whole row 1, and one of row 2."""
    assert list(rectangles((3, 4), 2, 9)) == [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    assert list(rectangles((3, 4), 5, 7)) == [((1, 1), (1, 2))]
    assert list(rectangles((5,), 1, 4)) == [((1,), (3,))]
    assert list(rectangles((3, 4), 4, 4)) == []


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_rectangles_are_the_range_in_order(shape: list[int], data: st.DataObject) -> None:
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size))
    whole = torch.arange(size).view(shape)
    found = []
    for offsets, sizes in rectangles(tuple(shape), start, end):
        part = whole
        for dim, (offset, count) in enumerate(zip(offsets, sizes, strict=True)):
            part = part.narrow(dim, offset, count)
        found += part.flatten().tolist()
    assert found == list(range(start, end))
