import numpy as np
import pytest

from megatron_post.curation.duplicates.words import WordHashes, dialog_hash, ngram_hashes, prompt_keys


def asked(prompt: str, answer: str = "The answer.") -> list[tuple[str, str]]:
    return [("user", prompt), ("assistant", answer)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Hello  there", "hello there\n"),
        ("Stra\u00dfe", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),  # one code point, and a letter with a combining accent
        ("\u00a0a\tb", "A B"),
    ],
)
def test_dialogs_that_differ_in_case_blanks_or_form_are_equal(first: str, second: str) -> None:
    assert dialog_hash(asked(first)) == dialog_hash(asked(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (asked("a b"), asked("ab")),
        (asked("x = 1"), asked("x = -1")),
        (asked("ab", "c"), asked("a", "bc")),
        ([("user", "a"), ("assistant", "b")], [("system", "a"), ("assistant", "b")]),
        (asked("5\u00b2"), asked("52")),
    ],
)
def test_other_dialogs_are_not_equal(first: list[tuple[str, str]], second: list[tuple[str, str]]) -> None:
    assert dialog_hash(first) != dialog_hash(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Tom has 3 apples.", "Tom has 12 apples."),
        ("It costs $1,250.50.", "It costs $7."),
        ("Add 1/2 and 3.", "Add 3/4 and 10."),
        ("the 1st of 5", "the 22nd of 7"),
        ("x equals -3.", "x equals 4."),
        ("Tom has three apples.", "Tom has twenty-five apples."),
        ("at 10:30", "at 9:05"),
    ],
)
def test_prompts_with_other_numbers_are_equal_once_numbers_are_masked(first: str, second: str) -> None:
    keys = [prompt_keys([("user", prompt)], []) for prompt in (first, second)]
    assert keys[0].masked == keys[1].masked
    assert keys[0].prompt != keys[1].prompt


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Tom has 3 apples.", "Tom has 3 pears."),
        ("3 - 4", "3 + 4"),
        ("Tom has 3 apples and 4 pears.", "Tom has 3 apples."),
        ("someone", "some"),  # "one" is a number only as a word of its own
    ],
)
def test_masking_numbers_leaves_other_differences(first: str, second: str) -> None:
    assert prompt_keys([("user", first)], []).masked != prompt_keys([("user", second)], []).masked


def test_words_of_scripts_without_blanks_are_their_characters() -> None:
    words = WordHashes(symbols=False)
    assert words.spelled("\u6771\u4eac is \u5927") == ["\u6771", "\u4eac", "is", "\u5927"]
    assert WordHashes(symbols=True).spelled("a+b, c") == ["a", "+", "b", ",", "c"]
    assert words.spelled("a+b, c") == ["a", "b", "c"]


def test_a_word_has_the_same_hash_in_every_text_and_process() -> None:
    first = WordHashes(symbols=False).of("one two one")
    assert first[0] == first[2] != first[1]
    # a constant, so that columns of earlier runs stay valid
    assert WordHashes(symbols=False).of("One")[0] == first[0] == 10457265594366419360


def test_ngrams_depend_on_order_and_short_texts_have_one() -> None:
    words = WordHashes(symbols=False)
    ngrams = ngram_hashes(words.of("a b c d"), 3)
    assert len(ngrams) == 2
    assert ngrams[1] == ngram_hashes(words.of("b c d"), 3)[0]
    assert not np.isin(ngram_hashes(words.of("c b a"), 3), ngrams).any()
    assert len(ngram_hashes(words.of("a b"), 3)) == 1
    assert len(ngram_hashes(words.of(""), 3)) == 0
