"""The steps that drop rows by what their texts are: repeats, encodings, languages and lengths."""

import pytest

from megatron_post.config.load import ConfigError
from megatron_post.curation.repeats import Repeats
from tests.unit.curation.place import Place, dialog

WORDS = [f"word{n}" for n in range(100)]
REPEATS = Repeats(kind="repeats")


def test_repeated_lines() -> None:
    """Of 10 lines 4 repeat an earlier one. 0.4 is more than 0.3."""
    lines = [" ".join(WORDS[10 * n : 10 * n + 10]) for n in range(6)]
    assert REPEATS.reason("\n".join(lines)) is None
    assert REPEATS.reason("\n\n".join([*lines, *lines[:4]])) == "repeated lines"
    allowed = REPEATS.model_copy(update={"lines": 0.4, "line_characters": 0.4, "ngrams": {}})
    assert allowed.reason("\n".join([*lines, *lines[:4]])) is None


def test_repeated_words() -> None:
    """30 of 100 words are "no way", which is 15 times 5 of 85 x 6 + ... characters."""
    text = " ".join(["no way"] * 30 + WORDS[:40])
    assert REPEATS.reason(text) == "repeated 2-grams"
    only = REPEATS.model_copy(update={"top_ngrams": {}, "ngrams": {5: 0.15}})
    assert only.reason(" ".join(WORDS)) is None
    assert only.reason(" ".join([*WORDS[:50], *WORDS[:20]])) == "repeated 5-grams"
    assert only.reason(" ".join([*WORDS[:50], *WORDS[:4]])) is None


def test_characters_of_repeated_ngrams_are_those_of_a_direct_count() -> None:
    """A loop over n-grams marks the words of each that was seen before."""
    words = (WORDS[:12] * 3 + WORDS[50:60]) * 2 + ["x", "long" * 5]
    for size in (2, 5, 9):
        seen: set[tuple[str, ...]] = set()
        marked: set[int] = set()
        for start in range(len(words) - size + 1):
            ngram = tuple(words[start : start + size])
            if ngram in seen:
                marked |= {*range(start, start + size)}
            seen.add(ngram)
        share = sum(len(words[place]) for place in marked) / sum(map(len, words))
        for limit, expected in ((share + 1e-9, None), (share - 1e-9, f"repeated {size}-grams")):
            step = REPEATS.model_copy(update={"top_ngrams": {}, "ngrams": {size: limit}})
            assert step.reason(" ".join(words)) == expected


def test_short_responses_are_not_measured(place: Place) -> None:
    place.add_source("a", [dialog("q", "no " * 49), dialog("q", "no " * 50), dialog("no " * 90, "a")])
    place.curate({"kind": "repeats"})
    assert place.dropped() == ["repeated 2-grams"]


def test_broken_encodings_are_repaired_or_dropped(place: Place) -> None:
    pytest.importorskip("ftfy")
    texts = ["schön und „gut“ – ﬁn", "schÃ¶n â€“ ja", "lost \ufffd bytes", "plain"]
    place.add_source("a", [dialog("q", text) for text in texts])
    place.curate({"kind": "encoding"})
    assert [row["messages"][1]["content"] for row in place.rows()] == [texts[0], "schön – ja", "plain"]
    assert place.dropped() == ["characters that were lost in decoding"]


def test_other_languages_are_dropped(place: Place) -> None:
    pytest.importorskip("py3langid")
    english = "The weather is fine today, and we will go for a long walk in the forest."
    german = "Das Wetter ist heute schön, und wir werden im Wald lange spazieren gehen."
    code = "```python\nfor number in range(10):\n    print(number)\n```"
    place.add_source("a", [dialog("Wie ist das Wetter?", english), dialog("How is it?", german),
                           dialog("q", "ja"), dialog("q", code)])  # fmt: skip
    report = place.curate({"kind": "languages", "keep": ["en"]})
    assert place.dropped() == ["language de"]
    assert report["steps"][0]["report"] == {"languages": {"none": 2, "de": 1, "en": 1}}


def test_lengths_of_responses(place: Place) -> None:
    place.add_source("a", [dialog("q" * 9, "a"), dialog("q", "a" * 5), dialog("q", "a" * 9)])
    place.curate({"kind": "lengths", "least_response": 2, "most_response": 5})
    assert place.dropped() == ["too short a response", "too long a response"]
    with pytest.raises(ConfigError, match="the fewest characters, 9, are more than the most, 2"):
        place.curate({"kind": "lengths", "least_response": 9, "most_response": 2})


def test_a_step_sees_the_rows_of_its_sources(place: Place) -> None:
    for name in ("a", "b"):
        place.add_source(name, [dialog("q", "a")])
    place.curate({"kind": "lengths", "least_response": 2, "sources": ["b"]})
    assert [row["curation"]["source"] for row in place.rows()] == ["a"]
