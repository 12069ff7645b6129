"""Identifies the language of a text, with py3langid. Its model is a part of its package."""

import importlib.util
from functools import lru_cache
from typing import Any, NamedTuple

import regex

from megatron_post.installation import install_command
from megatron_post.synthesis.languages.table import LANGUAGES, Code

LEAST_LETTERS = 30  # a text with fewer letters is not identified
_LETTER = regex.compile(r"[\p{L}\p{M}]")


class Guess(NamedTuple):
    """The most likely language of a text. confidence: from 0 to 1, among the languages of the table."""

    code: Code
    confidence: float


def identified(text: str) -> Guess | None:
    """The language of a text without code and formulas. None if the text has too few letters."""
    if letters_in(text) < LEAST_LETTERS:
        return None
    code, confidence = _identifier().classify(text)
    return Guess(code, float(confidence))


def letters_in(text: str) -> int:
    """The number of letters and of marks on them, such as the vowels of Hindi and Thai."""
    return len(_LETTER.findall(text))


def check_installed() -> None:
    """Raises `ValueError` if py3langid is not installed."""
    if importlib.util.find_spec("py3langid") is None:
        raise ValueError(f"languages are identified by py3langid: {install_command('synthesize')}")


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(LANGUAGES))
    return identifier
