"""The languages that recipes know, with their English names and their scripts.

Languages that can hardly be distinguished in writing are left out, such as Serbian and Croatian, or the two
forms of Norwegian.
"""

from typing import Literal, NamedTuple, get_args

# fmt: off
Code = Literal[
    "ar", "bn", "cs", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja",
    "ko", "nl", "pl", "pt", "ro", "ru", "sv", "ta", "te", "th", "tr", "uk", "ur", "vi", "zh",
]
# fmt: on


class Language(NamedTuple):
    """scripts: names of Unicode's property Script, of all letters that the language is written with."""

    name: str
    scripts: tuple[str, ...] = ("Latin",)


LANGUAGES: dict[Code, Language] = {
    "ar": Language("Arabic", ("Arabic",)),
    "bn": Language("Bengali", ("Bengali",)),
    "cs": Language("Czech"),
    "de": Language("German"),
    "el": Language("Greek", ("Greek",)),
    "en": Language("English"),
    "es": Language("Spanish"),
    "fa": Language("Persian", ("Arabic",)),
    "fi": Language("Finnish"),
    "fr": Language("French"),
    "he": Language("Hebrew", ("Hebrew",)),
    "hi": Language("Hindi", ("Devanagari",)),
    "hu": Language("Hungarian"),
    "id": Language("Indonesian"),
    "it": Language("Italian"),
    "ja": Language("Japanese", ("Han", "Hiragana", "Katakana")),
    "ko": Language("Korean", ("Hangul", "Han")),
    "nl": Language("Dutch"),
    "pl": Language("Polish"),
    "pt": Language("Portuguese"),
    "ro": Language("Romanian"),
    "ru": Language("Russian", ("Cyrillic",)),
    "sv": Language("Swedish"),
    "ta": Language("Tamil", ("Tamil",)),
    "te": Language("Telugu", ("Telugu",)),
    "th": Language("Thai", ("Thai",)),
    "tr": Language("Turkish"),
    "uk": Language("Ukrainian", ("Cyrillic",)),
    "ur": Language("Urdu", ("Arabic",)),
    "vi": Language("Vietnamese"),
    "zh": Language("Chinese", ("Han",)),
}
assert set(LANGUAGES) == set(get_args(Code))
