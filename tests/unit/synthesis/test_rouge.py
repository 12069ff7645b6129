"""ROUGE-L by rapidfuzz is ROUGE-L as rouge_score defines it."""

import re
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rapidfuzz")

from megatron_post.synthesis.rouge import RougePool, rouge_l, words_of

# figures of rouge_score 0.1.2: RougeScorer(["rougeL"]).score(first, second)["rougeL"].fmeasure
PUBLISHED = [
    ("Write a story about a dog.", "Write a poem about the dog!", 0.6666666666666666),
    ("Don't stop; 3.5% of it", "dont stop 3 5 of it", 0.7692307692307692),
    ("a b c d e f g h i j", "a b c d e f g x y z", 0.7),
    ("Translate the sentence into French", "Translate this sentence into French, please", 0.7272727272727272),
    ("", "x", 0),
    ("naïve café", "nai ve caf", 0.6666666666666666),
    ("one two three four five six seven", "seven six five four three two one", 0.14285714285714285),
    (
        "Given a sentence, name its verbs.",
        "Given a sentence, name all of its nouns and verbs.",
        0.7499999999999999,
    ),
]


def _words(text: str) -> list[str]:
    """rouge_score's tokens without its stemmer: other characters become blanks, and words are split there."""
    return [w for w in re.split(r"\s+", re.sub(r"[^a-z0-9]+", " ", text.lower())) if w]


def _by_definition(first: list[str], second: list[str]) -> Fraction:
    """The F-measure of precision and recall, by the table of the longest common subsequence."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, j in product(range(len(first)), range(len(second))):
        longer = max(table[i][j + 1], table[i + 1][j])
        table[i + 1][j + 1] = table[i][j] + 1 if first[i] == second[j] else longer
    length = table[-1][-1]
    if not length:
        return Fraction(0)
    precision, recall = Fraction(length, len(first)), Fraction(length, len(second))
    return 2 * precision * recall / (precision + recall)


WORDS = ("the", "a", "cat", "sat", "on", "Mat", "mat,", "12", "1.2", "don't", "é", "ß", "İ", "_x_", "...")
TEXTS = st.lists(st.sampled_from(WORDS), max_size=30)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_the_figure_is_that_of_the_definition(first: list[str], second: list[str]) -> None:
    one, other = " ".join(first), " ".join(second)
    assert words_of(one) == _words(one)
    exact = _by_definition(_words(one), _words(other))
    assert rouge_l(one, other) == float(exact)  # both are rounded once
    assert (rouge_l(one, other) >= 0.7) == (exact >= Fraction(7, 10))


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=20))
def test_the_closest_of_a_pool_is_the_closest_of_all(first: list[str], pool: list[list[str]]) -> None:
    text, texts = " ".join(first), [" ".join(words) for words in pool]
    best = max(rouge_l(text, other) for other in texts)
    found = RougePool(texts).closest(text)
    assert found is not None and found[0] == best == rouge_l(text, found[1])
    close = RougePool(texts).closest(text, least=0.7)
    assert (close is not None) == (best >= 0.7) and (close is None or close[0] == best)


@pytest.mark.parametrize(("first", "second", "figure"), PUBLISHED)
def test_figures_of_rouge_score_itself(first: str, second: str, figure: float) -> None:
    assert rouge_l(first, second) == pytest.approx(figure, abs=1e-15)


def test_rapidfuzz_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"ROUGE-L needs rapidfuzz: pip install .*synthesize"):
        RougePool()


def test_seven_tenths_is_too_close() -> None:
    first = "a b c d e f g h i j"
    second = "a b c d e f g x y z"
    assert rouge_l(first, second) == 0.7
    assert RougePool([first]).closest(second, least=0.7) == (0.7, first)
