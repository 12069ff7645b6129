"""What a server asks for in its headers."""

import time
from email.utils import formatdate

import pytest

from megatron_post.inference.http_client import seconds_of


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("", 0),
        ("soon", 0),
        ("-3", 0),
        ("nan", 0),
        ("inf", 0),
        ("1e9", 600),  # no server stops a run for a day
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Fri, 99 Foo 9999 99:99:99 GMT", 0),
    ],
)
def test_retry_after(value: str, seconds: float) -> None:
    assert seconds_of(value) == seconds


def test_retry_after_as_a_date() -> None:
    """It has whole seconds, and some time passes in this test."""
    assert 25 < seconds_of(formatdate(time.time() + 30, usegmt=True)) <= 30
