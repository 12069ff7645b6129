"""Regular expressions that a user gave, on texts that a model wrote.

Python's own `re` tries every way in which a pattern such as `(a|aa)+$` may match. A text may have more ways
than anyone can wait for. The package `regex` reads the same patterns and stops after a time.
"""

import contextlib
from collections.abc import Iterator
from itertools import islice

import regex

SECONDS = 2.0  # of the processor for one text; a pattern that is not hostile takes milliseconds
LONGEST = 10_000  # characters; longer ones take seconds to be compiled


def check_pattern(pattern: str) -> int:
    """The number of its groups. Raises `ValueError` for what is no regular expression."""
    if len(pattern) > LONGEST:
        raise ValueError(f"a pattern of {len(pattern):,} characters; no more than {LONGEST:,} are read")
    try:
        return int(regex.compile(pattern).groups)
    except (regex.error, RecursionError, OverflowError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{pattern!r} is no regular expression: {reason}") from None


def first_group(pattern: str, text: str) -> str | None:
    """The first group of the first match, or None. Raises `ValueError` where the search takes too long."""
    with _patience(pattern, text):
        match = regex.search(pattern, text, timeout=SECONDS)
        return None if match is None else match[1]


def occurs(pattern: str, text: str, *, times: int) -> bool:
    """Whether a pattern matches so many times, whatever the case. Raises as `first_group` does."""
    with _patience(pattern, text):
        matches = regex.finditer(pattern, text, regex.IGNORECASE, timeout=SECONDS)
        return sum(1 for _ in islice(matches, times)) == times


@contextlib.contextmanager
def _patience(pattern: str, text: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise ValueError(
            f"the pattern {pattern!r} takes more than {SECONDS:g} s on a text of {len(text):,} characters "
            f"({text[:40]!r}...); write it without repeats that match the same text in several ways"
        ) from None
