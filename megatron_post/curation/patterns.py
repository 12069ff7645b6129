"""Searches texts of models with regular expressions of users, within a time limit.

Python's `re` tries every way in which a pattern such as `(a|aa)+$` may match, and their number can grow
exponentially with the text. The package `regex` accepts the same patterns and has a time limit.
"""

import contextlib
from collections.abc import Iterator
from itertools import islice

import regex

SECONDS = 2.0  # processor time for one text. A normal pattern takes milliseconds
# A backslash in a replacement, with the group that it names if it names one.
_GROUP = regex.compile(r"\\(?:(?P<number>[1-9]\d?)|g<(?P<name>\w+)>|[nrt\\]|(?P<other>.?))")
LONGEST = 10_000  # characters of a pattern. Longer ones take seconds to compile


def check_pattern(pattern: str) -> int:
    """The number of groups in a pattern. Raises `ValueError` if it is not a regular expression."""
    if len(pattern) > LONGEST:
        raise ValueError(f"a pattern of {len(pattern):,} characters; no more than {LONGEST:,} are read")
    try:
        return int(regex.compile(pattern).groups)
    except (regex.error, RecursionError, OverflowError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{pattern!r} is no regular expression: {reason}") from None


def first_group(pattern: str, text: str) -> str | None:
    """The first group of the first match, or None. Raises `ValueError` if the search takes too long."""
    with _time_limit(pattern, text):
        match = regex.search(pattern, text, timeout=SECONDS)
        return None if match is None else match[1]


def occurs(pattern: str, text: str, *, times: int) -> bool:
    """Whether a pattern matches at least `times` times, ignoring case. Raises as `first_group` does."""
    with _time_limit(pattern, text):
        matches = regex.finditer(pattern, text, regex.IGNORECASE, timeout=SECONDS)
        return sum(1 for _ in islice(matches, times)) == times


def replaced(pattern: str, replacement: str, text: str) -> str:
    """The text with a replacement for each match, ignoring case. Raises as `first_group` does."""
    with _time_limit(pattern, text):
        return str(regex.sub(pattern, replacement, text, flags=regex.IGNORECASE, timeout=SECONDS))


def check_replacement(pattern: str, replacement: str) -> None:
    r"""Raises `ValueError` if a replacement names a group that the pattern does not have, such as \2."""
    compiled = regex.compile(pattern)
    for match in _GROUP.finditer(replacement):
        if match["number"] is match["name"] is match["other"] is None:
            continue  # a newline, a tab or a backslash
        name = match["number"] or match["name"]
        known = int(name) <= compiled.groups if name and name.isdigit() else name in compiled.groupindex
        if not known:
            raise ValueError(
                f"{replacement!r}: {match[0]} is no group of the pattern, which has {compiled.groups} "
                f"and the names {list(compiled.groupindex)}; write a backslash as two"
            )


@contextlib.contextmanager
def _time_limit(pattern: str, text: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise ValueError(
            f"the pattern {pattern!r} takes more than {SECONDS:g} s on a text of {len(text):,} characters "
            f"({text[:40]!r}...); write it without repeats that match the same text in several ways"
        ) from None
