import itertools
import random

import numpy as np
import pytest

from megatron_post.curation.duplicates.near import (
    NearDuplicates,
    band_groups,
    band_hashes,
    band_shape,
    colliding_rows,
    jaccard,
)
from megatron_post.curation.duplicates.words import WordHashes, ngram_hashes

THRESHOLD = 0.7


def ngrams_of(texts: list[str]) -> list[np.ndarray]:
    words = WordHashes(symbols=True)
    return [np.unique(ngram_hashes(words.of(text), 3)) for text in texts]


def find(texts: list[str], *, spared: set[tuple[int, int]] = frozenset()) -> NearDuplicates:  # type: ignore[assignment]
    ngrams = ngrams_of(texts)
    bands = band_hashes(ngrams, threshold=THRESHOLD)
    rows = colliding_rows(bands.T, np.ones(len(texts), bool))
    groups = band_groups(bands.T, rows)
    found = NearDuplicates(
        groups,
        range(len(rows)),
        lambda place: ngrams[rows[place]],
        threshold=THRESHOLD,
        spared=lambda a, others: np.array([(int(rows[a]), int(rows[b])) in spared for b in others], bool),
    )
    repeats = np.full(len(texts), -1)
    repeats[rows] = np.where(found.repeats >= 0, rows[found.repeats], -1)
    similarity = np.zeros(len(texts))
    similarity[rows] = found.similarity
    found.repeats, found.similarity = repeats, similarity
    return found


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    bands, length = band_shape(threshold)
    assert bands * length <= 128
    assert 1 - (1 - threshold**length) ** bands >= 0.99
    longer = length + 1
    assert longer > 128 or 1 - (1 - threshold**longer) ** (128 // longer) < 0.99


def test_greedy_selection_equals_a_comparison_of_all_pairs() -> None:
    """Families of texts with a few words changed, so that similarities are on both sides of the threshold."""
    draw = random.Random(3)
    texts = []
    for family in range(30):
        words = [f"w{family}x{place}" for place in range(40)]
        for _ in range(6):
            changed = list(words)
            for place in draw.sample(range(40), draw.randint(0, 4)):
                changed[place] = f"other{draw.random()}"
            texts.append(" ".join(changed))
    draw.shuffle(texts)
    ngrams = ngrams_of(texts)
    kept: list[int] = []
    expected = []
    for row in range(len(texts)):
        best = max((jaccard(ngrams[row], ngrams[other]) for other in kept), default=0.0)
        expected.append(best if best >= THRESHOLD else 0.0)
        if best < THRESHOLD:
            kept.append(row)
    found = find(texts)
    assert [row for row in range(len(texts)) if found.repeats[row] < 0] == kept
    assert np.allclose(found.similarity, expected)
    assert 30 < len(kept) < 150
    assert not found.crowded.any()


def test_a_chain_is_not_followed() -> None:
    """The second text is close to both others, which are far from each other. Only it is dropped."""
    words = [f"w{place}" for place in range(60)]
    first = " ".join(words)
    second = " ".join([*words[:-5], *"abcde"])
    third = " ".join([*"fghijklm", *words[8:-5], *"abcde"])
    similar = [jaccard(*ngrams_of([x, y])) for x, y in itertools.combinations([first, second, third], 2)]
    assert similar[0] >= THRESHOLD <= similar[2]
    assert similar[1] < THRESHOLD
    assert find([first, second, third]).repeats.tolist() == [-1, 0, -1]


def test_spared_pairs_are_both_kept() -> None:
    text = " ".join(f"w{place}" for place in range(40))
    assert find([text, f"{text} 5"]).repeats.tolist() == [-1, 0]
    assert find([text, f"{text} 5"], spared={(1, 0)}).repeats.tolist() == [-1, -1]


def test_short_texts_are_compared_as_a_whole() -> None:
    assert find(["yes", "Yes", "no", "yes please"]).repeats.tolist() == [-1, 0, -1, -1]


def test_rows_without_a_part_have_no_groups() -> None:
    bands = band_hashes(ngrams_of(["a b c d"] * 3), threshold=THRESHOLD)
    assert colliding_rows(bands.T, np.array([True, False, True])).tolist() == [0, 2]
    assert colliding_rows(bands.T, np.array([True, False, False])).tolist() == []
    assert band_hashes([], threshold=THRESHOLD).shape == (0, band_shape(THRESHOLD)[0])


def test_a_crowd_of_similar_rows_is_counted() -> None:
    """Each row shares a band with all others, and no pair reaches the threshold.

    The first 101 rows are compared with all earlier ones.
    """
    count = 300
    groups = np.zeros((count, 1), np.int64)
    found = NearDuplicates(
        groups,
        range(count),
        lambda place: np.array([place], np.uint64),
        threshold=THRESHOLD,
        spared=lambda place, others: np.zeros(len(others), bool),
    )
    assert (found.repeats == -1).all()
    assert found.crowded.tolist() == [row > 100 for row in range(count)]
