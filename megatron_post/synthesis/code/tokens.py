"""Splits a program in any language into tokens, in linear time and without parsing it."""

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from megatron_post.sandbox.languages import Language

_C_COMMENT = r"//[^\n]*|/\*.*?(?:\*/|\Z)"
_HASH_COMMENT = r"(?<![\w$\{\\])\#[^\n]*"
_COMMENTS: dict[Language, str] = {
    "python": _HASH_COMMENT,
    "javascript": _C_COMMENT,
    "cpp": rf"{_C_COMMENT}|^[ ]*\#[^\n]*",  # directives are not mutated either
    "java": _C_COMMENT,
    "rust": rf"{_C_COMMENT}|\#!?\[[^\]\n]*\]?",
    "bash": _HASH_COMMENT,
}
# A string without an end stops at the end of its line. Searching further would take quadratic time.
_DOUBLE = r'"(?:\\.|[^"\\\n])*"?'
_SINGLE = r"'(?:\\.|[^'\\\n])*'?"
_CHARACTER = r"'(?:\\[^\n]{1,10}?|[^'\\\n])'"  # does not match a lifetime of Rust
_STRINGS: dict[Language, str] = {
    "python": rf'"""(?:\\.|[^\\])*?(?:"""|\Z)|\'\'\'(?:\\.|[^\\])*?(?:\'\'\'|\Z)|{_DOUBLE}|{_SINGLE}',
    "javascript": rf"{_DOUBLE}|{_SINGLE}|`(?:\\.|[^`\\])*`?",
    "cpp": rf"{_DOUBLE}|{_CHARACTER}",
    "java": rf"{_DOUBLE}|{_CHARACTER}",
    "rust": rf"{_DOUBLE}|{_CHARACTER}",
    "bash": rf"{_DOUBLE}|{_SINGLE}",
}
_OTHERS = (
    r"(?P<number>(?<![\w.])\d+(?![\w.]))|(?P<word>[^\W\d]\w*|(?<=\s)-[a-z]{2}(?=\s))|"
    r"(?P<operator>&&=?|\|\|=?|<<=?|>>=?|[=!]==?|[-+*/%<>&|^]=|=>|->|::|\+\+|--|\*\*|[-+*/%<>=!&|^~?:])|"
    r"(?P<other>\d[\w.]*|[^\s\w])"
)


class Token(NamedTuple):
    """A token of a program.

    kind: "comment", "string", "number" (a plain integer), "word", "operator" or "other". start: its index in
    the text.
    """

    kind: str
    text: str
    start: int


@cache
def _pattern(language: Language) -> re.Pattern[str]:
    first = rf"(?P<comment>{_COMMENTS[language]})|(?P<string>{_STRINGS[language]})"
    return re.compile(f"{first}|{_OTHERS}", re.MULTILINE | re.DOTALL)


def tokens(language: Language, source: str) -> Iterator[Token]:
    """The tokens of a program, comments included."""
    for found in _pattern(language).finditer(source):
        assert found.lastgroup is not None
        yield Token(found.lastgroup, found[0], found.start())
