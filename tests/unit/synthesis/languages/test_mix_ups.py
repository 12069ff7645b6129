"""Letters of another script, words of two scripts, and texts or paragraphs in another language."""

import time

import pytest

from megatron_post.synthesis.languages.mix_ups import language_fault, script_fault
from megatron_post.synthesis.languages.table import Code
from tests.unit.synthesis.languages.translator import PHRASES, texts

LANGUAGES = list(PHRASES)


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_text_in_its_own_language_has_no_fault(code: Code) -> None:
    pytest.importorskip("py3langid")
    for text in texts(code, "Anna", 12, 5):
        assert (script_fault(text, code), language_fault(text, code)) == ("", "")


@pytest.mark.parametrize("code", LANGUAGES)
@pytest.mark.parametrize("other", LANGUAGES)
def test_a_text_or_a_paragraph_in_another_language_has_one(code: Code, other: Code) -> None:
    pytest.importorskip("py3langid")
    if code == other:
        return
    own, foreign = texts(code, "Anna", 12, 5), texts(other, "Anna", 12, 5)
    assert language_fault(foreign[0], code) and language_fault(foreign[1], code)
    first, second = own[1].split("\n\n")[0], foreign[1].split("\n\n")[1]
    assert language_fault(f"{own[0]}\n\n{first}\n\n{second}", code)


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_sentence_in_another_language_has_a_fault(code: Code) -> None:
    pytest.importorskip("py3langid")
    own, foreign = texts(code, "Anna", 12, 5), texts("de" if code == "en" else "en", "Anna", 12, 5)
    mark = "。" if code == "zh" else "."
    text = " ".join([*own[1].split("\n\n")[:2], *own[1].split("\n\n")[:2]]) + mark
    sentence = foreign[1].split("\n\n")[0]
    assert language_fault(text, code) == "" != language_fault(f"{text} {sentence} {text}", code)


@pytest.mark.parametrize(
    ("text", "code", "fault"),
    [
        ("Anna hat drei 蛋糕 und geht.", "de", "letters of another script: 2 CJK"),
        ("Anna hat drei Kuсhen und geht.", "de", "letters of another script: 1 CYRILLIC"),
        ("У Анны три тортa, и она уходит.", "ru", "a word of two scripts: тортa"),
        ("Anna hat drei Κuchen und geht.", "de", "a word of two scripts: Κuchen"),
        ("Anna hat drei Kuchen\ufffd.", "de", "broken characters: U+FFFD"),
        ("Anna\u0007 hat\ue000 drei Kuchen.\r\n\tGut", "de", "broken characters: U+0007, U+E000"),
        ("Anna hat drei Ku\u200bchen\u202e.", "de", "broken characters: U+200B, U+202E"),
        ("می\u200cخواهم \u200f12 کیک\u200e", "fa", ""),
        ("Es sind 3 µm, also π · Δx.", "de", ""),
        ("Es sind 3 kΩ, hν und µm.", "de", ""),
        ("Python में x का मान छापिए", "hi", ""),
        (
            "Anna subah kek banati hai aur unhein bazaar mein bechti hai",
            "hi",
            "0% of the letters are Devanagari",
        ),
        ("今日はケーキを三つ焼きました。", "ja", ""),
        ("今日はケーキを三つ焼きました。", "zh", "letters of another script: 7 HIRAGANA, 2 KATAKANA"),
        ("`蛋糕` und $蛋$", "de", ""),
    ],
)
def test_scripts(text: str, code: Code, fault: str) -> None:
    found = script_fault(text, code)
    assert found.startswith(fault) if fault else found == ""


def test_a_name_of_the_original_may_be_in_any_script() -> None:
    assert script_fault("Herr 李 hat drei Kuchen.", "de", also="Mr. 李 has three cakes.") == ""
    assert script_fault("Herr 李 hat drei 蛋糕.", "de", also="Mr. 李 has three cakes.")


@pytest.mark.parametrize("part", ["a", "д", "_", ".'", ". ", "\u200b"])
def test_a_long_text_takes_little_time(part: str) -> None:
    pytest.importorskip("py3langid")
    started = time.process_time()
    script_fault(part * 40_000, "de")
    language_fault(part * 40_000, "de")
    assert time.process_time() - started < 5


def test_a_few_words_have_no_language() -> None:
    pytest.importorskip("py3langid")
    assert language_fault("OK, 12!", "de") == ""
