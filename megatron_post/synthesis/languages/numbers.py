"""Compares the numbers of a text with those of its translation."""

import re
import unicodedata
from collections import Counter
from decimal import Decimal

import regex

from megatron_post.synthesis.languages.prose import latin_digits

_NO_BREAK = "\u00a0"
_SAME = str.maketrans(
    {"٫": ".", "٬": ",", "．": ".", "，": ",", "’": "'", "\u202f": _NO_BREAK, "\u2009": _NO_BREAK}
)
_MINUS = "\u2212"
# Other hyphens and dashes are those of words and ranges, such as "a-1" and "1-2".
_SIGN = re.compile(r"(?<![\w)\]}%.])[-\u2212\u2013]([$€£¥₹฿]?)(?=\d)")
_POINT_FIRST = re.compile(r"(?<![\w.])\.(?=\d)")
_OTHER_DIGITS = regex.compile(r"\p{No}+")  # such as "½" and the "²" of "x²"
_TOKEN = re.compile(rf"{_MINUS}?\d+(?:[.,'{_NO_BREAK}]\d+)*")
_SPACE_GROUPS = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")


def _form(group: str, point: str) -> re.Pattern[str]:
    """A number whose groups of three digits, or of two as in India, are separated by one mark."""
    mark = f"[{re.escape(group)}'{_NO_BREAK}]"
    grouped = rf"\d{{1,3}}(?P<mark>{mark})\d{{3}}(?:(?P=mark)\d{{3}})*"
    indian = rf"\d{{1,2}}(?:{mark}\d\d)+{mark}\d{{3}}"
    return re.compile(rf"{_MINUS}?(?:{grouped}|{indian}|\d+)(?:{re.escape(point)}\d+)?")


_POINT, _COMMA = _form(",", "."), _form(".", ",")


def numbers_of(text: str) -> Counter[Decimal]:
    """How often each number is in an English text. "1,000.5" is one number, and "1,2" is two."""
    found: Counter[Decimal] = Counter()
    for token in _TOKEN.findall(_plain(text)):
        found.update(_value(token, _POINT) or _digits(token))
    return found


def changed_numbers(text: str, translation: str) -> str:
    """Which numbers of an English text its translation lacks or adds; empty if it has the same.

    The translation may write them as its language does: "1.000,5", "1 000,5" and "१,०००.५" are 1000.5.
    Where a number can be read in two ways, the one that the text has is right.
    """
    wanted, plain = numbers_of(text), _plain(translation)
    found = _difference(wanted, plain)
    if not found or not _difference(wanted, _SPACE_GROUPS.sub(_NO_BREAK, plain)):
        return ""
    return found


def _difference(wanted: Counter[Decimal], plain: str) -> str:
    left, added = Counter(wanted), []
    tokens = _TOKEN.findall(plain)
    # Numbers with one reading come first. Else one with two readings could take the value that they need.
    for token in sorted(tokens, key=lambda token: len(_readings(token))):
        readings = _readings(token)
        fitting = next((reading for reading in readings if Counter(reading) <= left), None)
        if fitting is None:
            added.append(token)
        else:
            left -= Counter(fitting)
    parts = {"without": [f"{number:f}" for number in left.elements()], "added": added}
    return "; ".join(f"{name} {', '.join(numbers)}"[:200] for name, numbers in parts.items() if numbers)


def _readings(token: str) -> list[list[Decimal]]:
    """What a number in any language may be: one with a comma or a point before its fraction, or several."""
    found = [_value(token, _COMMA), _value(token, _POINT), _digits(token)]
    return [reading for place, reading in enumerate(found) if reading and reading not in found[:place]]


def _value(token: str, form: re.Pattern[str]) -> list[Decimal]:
    if form.fullmatch(token) is None:
        return []
    point = "." if form is _POINT else ","
    whole, _, fraction = token.partition(point)
    sign = "-" if whole.startswith(_MINUS) else ""
    return [Decimal(f"{sign}{re.sub(r'[^0-9]', '', whole)}.{fraction}")]


def _digits(token: str) -> list[Decimal]:
    return [Decimal(part.replace(_MINUS, "-")) for part in re.findall(rf"{_MINUS}?\d+", token)]


def _plain(text: str) -> str:
    """The text with the digits, marks and signs of English, and without LaTeX's marks within numbers."""
    text = _OTHER_DIGITS.sub(lambda digits: f" {unicodedata.normalize('NFKC', digits[0])} ", text)
    text = latin_digits(text).translate(_SAME)
    text = _SIGN.sub(rf"\1{_MINUS}", text.replace(_MINUS, "-"))
    text = _POINT_FIRST.sub("0.", text)
    text = re.sub(r"\{([,.])\}", r"\1", text)
    text = re.sub(r"(?<=\d)\\[,;: ](?=\d)", _NO_BREAK, text)
    return re.sub(r"\\!(?=\d)", "", text)
