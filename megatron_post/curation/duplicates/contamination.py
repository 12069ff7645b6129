"""Contamination: rows that share long n-grams of words with evaluation data (Brown et al., 2020, appendix C).

Only the evaluation data is in memory.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_post.curation.duplicates.words import Dialog, WordHashes, ngram_hashes

_FILTER_BITS = 24  # the table that sorts out most n-grams has 2^24 entries of a byte
SHORTEST = 5  # words of the shortest text that is compared as a whole

EvaluationRow = tuple[str, int]  # name of the evaluation, and number of the row in it


@dataclass(frozen=True)
class Match:
    """An evaluation row, and the words that a dialog has in common with it."""

    row: EvaluationRow
    words: str


class EvaluationNgrams:
    """The n-grams of evaluation data, and the first row that has each of them.

    An n-gram of more than `most_rows` rows is not compared: it belongs to a prompt template and not to a
    question. A text with fewer words than an n-gram, and with at least `SHORTEST`, is found where a whole
    message equals it. Still shorter texts are not compared.

    rows, too_short: for each evaluation the number of its rows, and of those without a text that is compared.
    common: the number of n-grams that are not compared.
    """

    def __init__(self, length: int, *, most_rows: int) -> None:
        """An index of the n-grams of evaluation rows.

        length: words of an n-gram. most_rows: an n-gram of more evaluation rows than this is not compared.
        """
        self._length, self._most_rows = length, most_rows
        self._words = WordHashes(symbols=False)
        self._names: list[EvaluationRow] = []
        self._pending: list[tuple[int, np.ndarray]] = []
        self._whole: dict[int, int] = {}
        self.rows: Counter[str] = Counter()
        self.too_short: Counter[str] = Counter()
        self.common = 0

    def add(self, texts: Iterable[str], name: EvaluationRow) -> None:
        """Add a row with its texts."""
        row = len(self._names)
        self._names.append(name)
        hashes = [self._words.of(text) for text in texts]
        ngrams = [ngram_hashes(words, self._length) for words in hashes if len(words) >= self._length]
        whole = [_whole_hash(words) for words in hashes if SHORTEST <= len(words) < self._length]
        for key in whole:
            self._whole.setdefault(key, row)
        if ngrams:
            self._pending.append((row, np.unique(np.concatenate(ngrams))))
        self.rows[name[0]] += 1
        self.too_short[name[0]] += not (ngrams or whole)

    def finish(self) -> None:
        """Sort what was added. Must be called once, before `first_shared`."""
        hashes = np.concatenate([np.empty(0, np.uint64), *(ngrams for _, ngrams in self._pending)])
        sizes = [len(ngrams) for _, ngrams in self._pending]
        rows = np.repeat(np.array([row for row, _ in self._pending], np.int64), sizes)
        # np.unique gives the first place of each n-gram. So the first row that has it is named.
        self._hashes, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        is_common = counts > self._most_rows
        self.common = int(is_common.sum())
        self._hashes, self._rows = self._hashes[~is_common], rows[first][~is_common]
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[self._hashes >> np.uint64(64 - _FILTER_BITS)] = True
        self._pending.clear()

    def first_shared(self, dialogs: Sequence[Dialog]) -> list[Match | None]:
        """For each dialog the first shared words, and the first evaluation row that has them; or None.

        N-grams do not cross the end of a message.
        """
        return [next(filter(None, (self._match(text) for _, text in dialog)), None) for dialog in dialogs]

    def _match(self, text: str) -> Match | None:
        words = self._words.of(text)
        if len(words) < self._length:
            row = self._whole.get(_whole_hash(words)) if len(words) >= SHORTEST else None
            return None if row is None else Match(self._names[row], " ".join(self._words.spelled(text)))
        ngrams = ngram_hashes(words, self._length)
        # A look-up in a table is faster than a search, and nearly all n-grams end here.
        places = np.flatnonzero(self._filter[ngrams >> np.uint64(64 - _FILTER_BITS)])
        if not len(places):
            return None
        found = np.searchsorted(self._hashes, ngrams[places]).clip(max=len(self._hashes) - 1)
        shared = np.flatnonzero(self._hashes[found] == ngrams[places])
        if not len(shared):
            return None
        start = int(places[shared[0]])
        spelled = self._words.spelled(text)[start : start + self._length]
        return Match(self._names[self._rows[found[shared[0]]]], " ".join(spelled))


def _whole_hash(words: np.ndarray) -> int:
    return int(ngram_hashes(words, len(words))[0])
