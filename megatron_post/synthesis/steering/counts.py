"""Counts words, sentences and paragraphs of a text. Each count is a smallest and a largest value."""

from collections.abc import Callable

import regex

_WORD = regex.compile(r"\w+(?:['’.,]\w+)*")
# scripts that are written without blanks between words
_NO_BLANKS = regex.compile(
    r"[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}"
    r"\p{Script=Myanmar}]"
)
# The quantifiers are possessive, so that a text that is only points takes linear time.
_END = regex.compile(r"(?<![.!?…؟।])[.!?…؟।]++[\"'”’»)\]*_]*+(?=\s|$)|[。！？]+[」』”’）]*")
# of these scripts, those in which a blank may end a sentence
_BLANK_ENDS = regex.compile(r"[\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}]")
# These may come before a point that ends no sentence: an initial, the number of a list item, an abbreviation.
_NO_END = regex.compile(
    r"(?:^\s*\d+|(?<!\w)(?:\p{L}|Mrs?|Ms|Dr|Prof|St|Jr|Sr|Inc|Ltd|Co|vs|etc|approx|cf|al|ca|bzw|usw|Nr|No)"
    r"|(?:\p{L}\.)+\p{L})\.[\"'”’»)\]*_]*$",
    regex.IGNORECASE,
)
_LONGEST_NO_END = 30  # characters
_GOES_ON = regex.compile(r"\s+\p{Ll}")


def _words(text: str) -> tuple[int, int]:
    """A word with a hyphen may be one or two. In scripts without blanks only characters can be counted."""
    by_blanks = sum(_WORD.search(piece) is not None for piece in text.split())
    runs = len(_WORD.findall(text))
    return min(by_blanks, runs), max(by_blanks, runs, len(text) if _NO_BLANKS.search(text) else 0)


def _sentences(text: str) -> tuple[int, int]:
    """A mark does not always end a sentence. A line without a mark, such as a heading, may be a sentence."""
    low = high = 0
    for line in text.splitlines():
        end = 0
        for match in _END.finditer(line):
            end = match.end()
            high += 1
            before = max(end - _LONGEST_NO_END, 0)
            low += not (_NO_END.search(line, before, end) or _GOES_ON.match(line, end))
        high += _WORD.search(line, end) is not None
    if _BLANK_ENDS.search(text):
        high = max(high, len(text.split()))
    return min(max(low, 1), high), high


def _paragraphs(text: str) -> tuple[int, int]:
    count = sum(bool(block.strip()) for block in regex.split(r"\n[ \t]*\n", text))
    return count, count


def _characters(text: str) -> tuple[int, int]:
    return len(text), len(text)


COUNTS: dict[str, Callable[[str], tuple[int, int]]] = {
    "words": _words,
    "sentences": _sentences,
    "paragraphs": _paragraphs,
    "characters": _characters,
}
