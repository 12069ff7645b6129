"""ROUGE-L of short texts, as the package rouge_score defines it: the F-measure of the longest common
subsequence of two texts' words.

With m and n words and a subsequence of l words, precision l/m and recall l/n give 2l / (m + n). This is also
rapidfuzz's normalized similarity of insertions and deletions, which is much faster.
"""

import importlib.util
import re
from collections.abc import Iterable

from megatron_post.installation import install_command

_NO_WORD = re.compile(r"[^a-z0-9]+")
_ROUNDING = 1e-9  # of rapidfuzz's figure, which decides nothing


def words_of(text: str) -> list[str]:
    """The words that ROUGE compares: runs of the letters a to z and of digits, in lower case."""
    return [word for word in _NO_WORD.split(text.lower()) if word]


class RougePool:
    """Texts of which the one that is closest to another text can be found.

    Each word is one character, so that rapidfuzz compares strings.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        """Raises `ValueError` if rapidfuzz is not installed."""
        check_installed()
        self._characters: dict[str, str] = {}
        self._coded: list[str] = []
        self.texts: list[str] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        self.texts.append(text)
        self._coded.append(self._code(text))

    def closest(self, text: str, *, least: float = 0.0) -> tuple[float, str] | None:
        """The greatest ROUGE-L to a text of the pool, and this text; None if it is less than `least`.

        The figure is rounded once, so that it can be compared with 0.7. The first of several texts wins.
        """
        from rapidfuzz import process
        from rapidfuzz.distance import Indel

        coded = self._code(text)
        found = process.extractOne(
            coded,
            self._coded,
            scorer=Indel.normalized_similarity,
            processor=None,
            score_cutoff=max(least - _ROUNDING, 0.0),
        )
        if found is None:
            return None
        other, _, place = found
        figure = _rouge_l(coded, other)
        return (figure, self.texts[place]) if figure >= least else None

    def _code(self, text: str) -> str:
        known = self._characters
        return "".join(known.setdefault(word, chr(len(known))) for word in words_of(text))


def check_installed() -> None:
    """Raises `ValueError` if rapidfuzz is not installed."""
    if importlib.util.find_spec("rapidfuzz") is None:
        raise ValueError(f"ROUGE-L needs rapidfuzz: {install_command('synthesize')}")


def rouge_l(first: str, second: str) -> float:
    """ROUGE-L of two texts, from 0 to 1. It is 0 if one of them has no words."""
    pool = RougePool([first])
    found = pool.closest(second)
    assert found is not None
    return found[0]


def _rouge_l(first: str, second: str) -> float:
    from rapidfuzz.distance import LCSseq

    if not first or not second:
        return 0.0
    return 2 * LCSseq.similarity(first, second) / (len(first) + len(second))
