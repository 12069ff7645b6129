"""Splits a text into prose, which a translation changes, and code and formulas, which it keeps."""

import re
import unicodedata

from megatron_post.synthesis.replies import blocks, outside_blocks

_INLINE_CODE = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"https?://\S+")
# `$` opens a formula if no blank follows, and closes it behind no blank and before no digit, as in Pandoc's
# Markdown. So "$5 and $6" is no formula. A formula has no second opening mark, so that a search is linear.
_FORMULA = re.compile(
    r"\$\$(?:[^$\\]|\\.)+\$\$"
    r"|\\\[(?:(?!\\[\[\]]).)+\\\]"
    r"|\\\((?:(?!\\[()]).)+\\\)"
    r"|(?<![\\$])\$(?![\s$])(?:[^$\\\n]|\\[^\n])+(?<!\s)\$(?![\d$])",
    re.DOTALL,
)
_WORDS_IN_FORMULA = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|mathrm|mbox|operatorname)\s*\{[^{}]*\}")
_SEPARATOR = re.compile(r"(?<=\d)(?:\{[,.]\}|\\[,;:! ]|[.,'’ ])+(?=\d)")


def prose_of(text: str) -> str:
    """The text without blocks of code, code within lines, formulas and links."""
    text = outside_blocks(text)
    for pattern in (_INLINE_CODE, _FORMULA, _LINK):
        text = pattern.sub(" ", text)
    return text


def code_of(text: str) -> list[str]:
    """The blocks of code of a text, each with its language, and the code within its lines, all sorted."""
    fenced = ["\n".join([block.language, block.code.strip("\n")]) for block in blocks(text)]
    return sorted(fenced + _INLINE_CODE.findall(outside_blocks(text)))


def formulas_of(text: str) -> list[str]:
    """The formulas of a text, sorted, without what a translation may change.

    This is white space, words in `\\text{...}` and the like, and the separators in numbers.
    """
    found = []
    for formula in _FORMULA.findall(_INLINE_CODE.sub(" ", outside_blocks(text))):
        formula = _WORDS_IN_FORMULA.sub(r"\\text{}", latin_digits(formula).strip("$"))
        formula = _SEPARATOR.sub("", formula)
        found.append("".join(formula.split()))
    return sorted(found)


def latin_digits(text: str) -> str:
    """The text with the decimal digits of all scripts as 0 to 9."""
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() and not c.isascii() else c for c in text)
