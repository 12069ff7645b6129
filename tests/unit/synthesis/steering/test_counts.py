"""Counts of words, sentences and paragraphs, with their least and greatest values."""

import time
from typing import get_args

import pytest

from megatron_post.synthesis.steering.counts import COUNTS
from megatron_post.synthesis.steering.formats import Format, verdict_on_format


@pytest.mark.parametrize(
    ("unit", "text", "expected"),
    [
        ("words", "The sky is blue.", (4, 4)),
        ("words", "A well-known sky - it's blue.", (5, 6)),
        ("words", "- one\n- two", (2, 2)),
        ("words", "1,000.5 steps", (2, 2)),
        ("words", "空は青い。", (1, 5)),
        ("words", "** - **", (0, 0)),
        ("sentences", "It is blue. It is wide!", (2, 2)),
        ("sentences", "It is blue... and wide.", (1, 2)),
        ("sentences", "Dr. Hall came at 3.30. He left.", (2, 3)),
        ("sentences", "Use fruit, e.g. apples.", (1, 2)),
        ("sentences", 'He said "No!" She left.', (2, 2)),
        ("sentences", "空は青い。海も青い。", (2, 2)),
        ("sentences", "no mark", (1, 1)),
        ("sentences", "A heading\n\nIt is blue.", (1, 2)),
        ("sentences", "ท้องฟ้าเป็นสีฟ้า ทะเลก็เช่นกัน", (1, 2)),
        ("sentences", "", (0, 0)),
        ("paragraphs", "One.\nStill one.\n \nTwo.\n\n\nThree.", (3, 3)),
        ("characters", "blue", (4, 4)),
    ],
)
def test_counts(unit: str, text: str, expected: tuple[int, int]) -> None:
    assert COUNTS[unit](text) == expected


@pytest.mark.parametrize("piece", [".", "! ", "[", "**", "a.", "-", "`", "| ", "\n"])
def test_hostile_replies_take_no_longer_than_others(piece: str) -> None:
    """With a quadratic search, 100,000 characters would take minutes of the processor."""
    text, before = piece * (100_000 // len(piece)) + "a", time.process_time()
    for count in COUNTS.values():
        count(text)
    for name in get_args(Format):
        verdict_on_format(name, text)
    assert time.process_time() - before < 10
