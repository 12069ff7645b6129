"""Rules on a reply that a program can check.

A check has three results. If it cannot be certain, as with the number of sentences around "e.g.", the result
is `unclear`. Such a reply is neither an example of following the rule nor one of breaking it.
"""

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_post.config.section import Count, Line, Section
from megatron_post.synthesis.languages.identify import identified
from megatron_post.synthesis.languages.mix_ups import language_fault, script_fault
from megatron_post.synthesis.languages.prose import prose_of
from megatron_post.synthesis.languages.table import LANGUAGES, Code
from megatron_post.synthesis.steering.counts import COUNTS
from megatron_post.synthesis.steering.formats import Format, items_in, json_value, verdict_on_format

Verdict = Literal["follows", "breaks", "unclear"]
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)|\d+")
_NO_LESS, _NO_MORE = r"(?<!\w)", r"(?!\w)"  # before and after a whole word
_SURE = 0.9  # least confidence in the language of a reply
_DESCRIBED = {
    "least_words": "The reply has at least {} words.",
    "most_words": "The reply has at most {} words.",
    "least_sentences": "The reply has at least {} sentences.",
    "most_sentences": "The reply has at most {} sentences.",
    "least_paragraphs": "The reply has at least {} paragraphs, with blank lines between them.",
    "most_paragraphs": "The reply has at most {} paragraphs, with blank lines between them.",
    "most_characters": "The reply has at most {} characters.",
    "format": "The format of the whole reply: {}.",
    "items": "The list, table or JSON array has exactly {} items.",
    "keys": "The reply is a JSON object with exactly these keys: {}.",
    "case": "All letters are in {} case.",
    "begins": "The reply begins with: {}",
    "ends": "The reply ends with: {}",
    "contains": "These words are in the reply: {}",
    "avoids": "These words are not in the reply: {}",
    "language": "The reply is in {}.",
}
_FORMATS: dict[Format, str] = {
    "json": "one JSON value, with nothing before and after it",
    "bullets": "a list with bullets, and nothing else",
    "numbers": "a numbered list, and nothing else",
    "table": "a Markdown table, and nothing else",
    "plain": "plain text without Markdown",
}
_WITH_JSON = {"format", "items", "keys", "most_characters", "contains", "avoids"}


class Rules(Section):
    """Rules that hold at the same time. None: this rule is not given."""

    least_words: Count | None = None
    most_words: Count | None = None
    least_sentences: Count | None = None
    most_sentences: Count | None = None
    least_paragraphs: Count | None = None
    most_paragraphs: Count | None = None
    most_characters: Count | None = None
    format: Format | None = None
    items: Count | None = None
    keys: tuple[Line, ...] | None = Field(None, min_length=1)
    case: Literal["lower", "upper"] | None = None
    begins: Line | None = None
    ends: Line | None = None
    contains: tuple[Line, ...] | None = Field(None, min_length=1)
    avoids: tuple[Line, ...] | None = Field(None, min_length=1)
    language: Code | None = None

    @model_validator(mode="after")
    def _can_all_hold(self) -> "Rules":
        given = self.given
        for unit in ("words", "sentences", "paragraphs"):
            if given.get(f"least_{unit}", 0) > given.get(f"most_{unit}", float("inf")):
                raise ValueError(f"least_{unit} is above most_{unit}")
        if self.items is not None and self.format in (None, "plain"):
            raise ValueError("items needs a format that has items")
        if self.keys is not None and (self.format != "json" or self.items is not None):
            raise ValueError("keys are those of a JSON object, so they need format=json and no items")
        if self.format == "json" and (others := sorted(given.keys() - _WITH_JSON)):
            raise ValueError(f"a JSON value has no {', '.join(others)}")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The rules that are given, as JSON."""
        return self.model_dump(mode="json", exclude_none=True)


def described(rules: Rules) -> list[str]:
    """A sentence for each rule, for a judge to read."""
    found = []
    for name, value in rules.given.items():
        if name == "format":
            value = _FORMATS[value]
        elif name == "language":
            value = LANGUAGES[value].name
        elif isinstance(value, list):
            value = ", ".join(value)
        found.append(_DESCRIBED[name].format(value))
    return found


def unstated(rules: Rules, system: str) -> str:
    """The first rule whose number or words are not in a system prompt. Empty if there is no such rule."""
    plain = system.casefold()
    numbers = {found.replace(",", "") for found in _NUMBER.findall(plain)}
    for name, value in rules.given.items():
        if name in ("format", "case", "language"):
            continue  # a text can state these in many ways
        for part in value if isinstance(value, list) else [value]:
            if not (str(part) in numbers if isinstance(part, int) else part.casefold() in plain):
                return name
    return ""


def checked(rules: Rules, text: str) -> dict[str, Verdict]:
    """The result for each rule that is given. text: without white space around it."""
    return {name: _checked(name, value, text, rules) for name, value in rules.given.items()}


def _checked(name: str, value: Any, text: str, rules: Rules) -> Verdict:
    bound, _, unit = name.partition("_")
    if unit:
        low, high = COUNTS[unit](text)
        if bound == "least":
            return _verdict(low >= value, high >= value)
        return _verdict(high <= value, low <= value)
    match name:
        case "format":
            return verdict_on_format(value, text)
        case "items" | "keys":
            assert rules.format is not None
            if verdict_on_format(rules.format, text) == "unclear":
                return "unclear"
            if name == "items":
                return _verdict(items_in(rules.format, text) == value)
            found = json_value(text)
            return _verdict(isinstance(found, dict) and sorted(found) == sorted(value))
        case "case":
            if text.lower() == text.upper():
                return "unclear"
            return _verdict(text == (text.lower() if value == "lower" else text.upper()))
        case "begins":
            starts = re.match(rf"{re.escape(value)}{_NO_MORE if value[-1].isalnum() else ''}", text)
            return _verdict(starts is not None, _letters(text).startswith(_letters(value)))
        case "ends":
            ends = re.search(rf"{_NO_LESS if value[0].isalnum() else ''}{re.escape(value)}\Z", text)
            return _verdict(ends is not None, _letters(text).endswith(_letters(value)))
        case "contains":
            whole, parts = ([has(text, word) for word in value] for has in (_has_word, _has))
            return _verdict(all(whole), all(parts))
        case "avoids":
            whole, parts = ([has(text, word) for word in value] for has in (_has_word, _has))
            return _verdict(not any(parts), not any(whole))
    return _on_language(value, text)


def _verdict(is_kept: bool, may_be_kept: bool = False) -> Verdict:
    return "follows" if is_kept else "unclear" if may_be_kept else "breaks"


def _letters(text: str) -> str:
    """The letters and digits of a text. Case and marks, such as those of Markdown, may differ."""
    return "".join(re.findall(r"\w+", text.casefold()))


def _has(text: str, word: str) -> bool:
    return word.casefold() in text.casefold()


def _has_word(text: str, word: str) -> bool:
    return re.search(f"{_NO_LESS}{re.escape(word.casefold())}{_NO_MORE}", text.casefold()) is not None


def _on_language(code: Code, text: str) -> Verdict:
    """`unclear` if the text is too short, its language is uncertain, or it mixes languages or scripts."""
    found = identified(prose_of(text))
    if found is None or found.confidence < _SURE:
        return "unclear"
    if found.code != code:
        return "breaks"
    return "unclear" if language_fault(text, code) or script_fault(text, code) else "follows"
