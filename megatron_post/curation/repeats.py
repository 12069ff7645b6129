"""The step `repeats` drops rows in which a response repeats lines or words.

The measures are those of Rae et al. (2021), "Scaling Language Models: Methods, Analysis & Insights from
Training Gopher", table A1. The defaults are the limits of that table.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from megatron_post.config.section import Count, Whole
from megatron_post.curation.columns import DROPPED
from megatron_post.curation.step import Batch, Pass, RowPass, Step, Values

Share = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[int, Field(ge=2, le=100)]
# Mixes the numbers of the words of an n-gram. It is odd, so no bit of a number is lost.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Repeats(Step):
    """Drops rows with repeated lines or n-grams of words in a response."""

    kind: Literal["repeats"] = Field(description="selects this step")
    lines: Share | None = Field(0.3, description="largest share of lines that repeat an earlier line")
    line_characters: Share | None = Field(0.2, description="the same, as a share of the lines' characters")
    top_ngrams: dict[Size, Share] = Field(
        default={2: 0.2, 3: 0.18, 4: 0.16},
        description="n -> largest share of characters in the most frequent n-gram",
    )
    ngrams: dict[Size, Share] = Field(
        default={5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1},
        description="n -> largest share of characters in n-grams that repeat an earlier one",
    )
    least_words: Count = Field(50, description="a response with fewer words is not measured")
    least_lines: Whole = Field(4, description="lines are not measured in a response with fewer of them")

    def passes(self, *, seed: int) -> Sequence[Pass]:
        return [
            RowPass(
                name=self.column,
                version=1,
                settings=self.model_dump(mode="json", exclude={"name", "sources"}),
                fields={DROPPED: pa.string()},
                annotate=self._annotate,
            )
        ]

    def _annotate(self, batch: Batch) -> Values:
        return {DROPPED: [self._reason_of_row([m.content for m in row.messages if m.role == "assistant"])
                          for row in batch.rows]}  # fmt: skip

    def _reason_of_row(self, responses: Sequence[str]) -> str | None:
        return next(filter(None, map(self.reason, responses)), None)

    def reason(self, text: str) -> str | None:
        """Why a response is dropped, or None."""
        words = text.split()
        if len(words) < self.least_words:
            return None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) >= self.least_lines:
            repeated = _repeated(lines)
            for limit, part, whole in (
                (self.lines, len(repeated), len(lines)),
                (self.line_characters, sum(map(len, repeated)), sum(map(len, lines))),
            ):
                if limit is not None and part > limit * whole:
                    return "repeated lines"
        return self._reason_of_words(words)

    def _reason_of_words(self, words: Sequence[str]) -> str | None:
        number: dict[str, int] = {}
        ids = np.array([number.setdefault(word, len(number)) for word in words], np.uint64)
        lengths = np.array([len(word) for word in words])
        most = lengths.sum()
        for sizes, measure in ((self.top_ngrams, _in_top_ngram), (self.ngrams, _in_repeated_ngrams)):
            for size, share in sizes.items():
                if len(words) >= size and measure(_ngrams(ids, size), lengths, size) > share * most:
                    return f"repeated {size}-grams"
        return None


def _repeated(lines: Sequence[str]) -> list[str]:
    """The lines that repeat an earlier one."""
    counts: Counter[str] = Counter()
    found = []
    for line in lines:
        if counts[line]:
            found.append(line)
        counts[line] += 1
    return found


def _ngrams(ids: np.ndarray, size: int) -> np.ndarray:
    """A hash of each n-gram of the words with these numbers. ids: uint64 [n]. uint64 [n - size + 1]."""
    found = np.zeros(len(ids) - size + 1, np.uint64)
    for place in range(size):
        found = (found ^ (ids[place : place + len(found)] + np.uint64(1))) * _FACTOR
        found ^= found >> np.uint64(29)
    return found


def _in_top_ngram(ngrams: np.ndarray, lengths: np.ndarray, size: int) -> int:
    """The characters in all occurrences of the n-gram that occurs most often, if it occurs twice.

    Occurrences that overlap count twice, as in the paper.
    """
    _, first, counts = np.unique(ngrams, return_index=True, return_counts=True)
    characters = np.convolve(lengths, np.ones(size, np.int64), "valid")[first]
    found = int((counts * characters)[counts == counts.max()].max())
    return found if counts.max() > 1 else 0


def _in_repeated_ngrams(ngrams: np.ndarray, lengths: np.ndarray, size: int) -> int:
    """The characters of words in an n-gram that repeats an earlier one. Each word counts once."""
    _, first = np.unique(ngrams, return_index=True)
    repeats = np.ones(len(ngrams), bool)
    repeats[first] = False
    edges = np.zeros(len(lengths) + 1, np.int64)
    np.add.at(edges, np.flatnonzero(repeats), 1)
    np.add.at(edges, np.flatnonzero(repeats) + size, -1)
    return int(lengths[np.cumsum(edges[:-1]) > 0].sum())
