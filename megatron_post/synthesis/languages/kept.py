"""Checks that a translation keeps what is the same in all languages, and is in the right language."""

from megatron_post.synthesis.languages.identify import LEAST_LETTERS, letters_in
from megatron_post.synthesis.languages.mix_ups import language_fault, script_fault
from megatron_post.synthesis.languages.numbers import changed_numbers
from megatron_post.synthesis.languages.prose import code_of, formulas_of, prose_of
from megatron_post.synthesis.languages.table import Code


def first_fault(
    original: str, translation: str, code: Code, shortest: float, longest: float
) -> tuple[str, str] | None:
    """The reason why the translation of an English text is wrong, with details. None if no check fails.

    shortest, longest: limits of the ratio of their lengths in characters, without code and formulas. They
    are not applied to a text of a few words.
    """
    if code_of(original) != code_of(translation):
        return "the translation changes code", ""
    if formulas_of(original) != formulas_of(translation):
        changed = set(formulas_of(translation)) ^ set(formulas_of(original))
        return "the translation changes a formula", ", ".join(sorted(changed))[:200]
    if changes := changed_numbers(original, translation):
        return "the translation changes numbers", changes
    ratio = _length(translation) / max(_length(original), 1)
    if letters_in(prose_of(original)) >= LEAST_LETTERS and not shortest <= ratio <= longest:
        return "the translation is too short or too long", f"{ratio:.2f} of the original"
    if fault := script_fault(translation, code, also=original):
        return "the translation mixes scripts", fault
    if fault := language_fault(translation, code):
        return "the translation is in another language", fault
    return None


def _length(text: str) -> int:
    return len(" ".join(prose_of(text).split()))
