"""Finds texts that are in another language or script than they should be, or that mix several."""

import unicodedata
from collections import Counter

import regex

from megatron_post.synthesis.languages.identify import LEAST_LETTERS, identified, letters_in
from megatron_post.synthesis.languages.prose import prose_of
from megatron_post.synthesis.languages.table import LANGUAGES, Code

_EVERYWHERE = ("Latin", "Greek", "Common", "Inherited")  # names, units and variables of any text
_LEAST_OWN = 0.5  # share of the letters that are in the language's own script
_SURE = 0.7  # confidence in another language of a single sentence
# Cyrillic letters, and these Greek ones, look like Latin letters. Other Greek letters stand for variables and
# units, as in "Δx" and "µm".
_LATIN, _ALIKE = r"\p{Script=Latin}\p{M}*", r"[\p{Script=Cyrillic}ΑΒΕΖΗΙΚΜΝΟΡΤΥΧο]\p{M}*"
_MIXED = regex.compile(rf"{_LATIN}{_ALIKE}|{_ALIKE}{_LATIN}")
_WORD = regex.compile(r"[\w\p{M}]+")
_LETTER = regex.compile(r"\p{L}")
# The replacement character, control characters, code points without a character, and invisible ones that
# no language needs. Joiners and the marks of direction are needed, as in Persian.
_BROKEN = regex.compile(r"[[\uFFFD\p{Cc}\p{Cn}\p{Co}\u200B\u202A-\u202E\u2060-\u2064\uFEFF]--\s]", regex.V1)
_END_OF_SENTENCE = regex.compile(r"(?<=[.!?…؟।][\"'”’»)\]*_]{0,3})\s+|(?<=[。！？])|\n")


def script_fault(text: str, code: Code, *, also: str = "") -> str:
    """Describes the letters of a text that its language does not use. Empty if there are none.

    also: a text whose scripts may be used too, such as the original of a translation, which may have a name
    in another script. Latin and Greek letters are allowed within any text, because names, units and
    variables have them, but not as most of it.
    """
    prose, own = prose_of(text), LANGUAGES[code].scripts
    if broken := set(_BROKEN.findall(prose)) - set(also):
        return f"broken characters: {', '.join(f'U+{ord(each):04X}' for each in sorted(broken)[:20])}"
    letters = _LETTER.findall(prose)
    allowed = _in_scripts((*own, *_EVERYWHERE))
    others = set(_LETTER.findall(also))
    foreign = Counter(
        unicodedata.name(letter, "unknown").split()[0]
        for letter in letters
        if not allowed.match(letter) and letter not in others
    )
    if foreign:
        return f"letters of another script: {', '.join(f'{count} {name}' for name, count in foreign.items())}"
    if mixed := next(filter(_MIXED.search, _WORD.findall(prose)), ""):
        return f"a word of two scripts: {mixed[:80]}"
    share = sum(bool(_in_scripts(own).match(letter)) for letter in letters) / max(len(letters), 1)
    if letters_in(prose) >= LEAST_LETTERS and share < _LEAST_OWN:
        return f"{share:.0%} of the letters are {' or '.join(own)}"
    return ""


def language_fault(text: str, code: Code) -> str:
    """Names the other language that a text or one of its sentences is in. Empty if there is none.

    A text with too few letters to be identified has no fault.
    """
    prose = prose_of(text)
    found = identified(prose)
    if found is not None and found.code != code:
        return f"{LANGUAGES[found.code].name} ({found.confidence:.2f}) instead of {LANGUAGES[code].name}"
    for sentence in _END_OF_SENTENCE.split(prose):
        found = identified(sentence)
        if found is not None and found.code != code and found.confidence >= _SURE:
            return f"{LANGUAGES[found.code].name} ({found.confidence:.2f}) in {sentence.strip()[:80]!r}"
    return ""


def _in_scripts(scripts: tuple[str, ...]) -> "regex.Pattern[str]":
    """A pattern of one letter. regex keeps the patterns that it has compiled."""
    return regex.compile("[" + "".join(rf"\p{{Script={script}}}" for script in scripts) + "]")
