"""Synthetic rows with planted duplicates, for the benchmark of `curate`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_post.storage.files import write_pieces

_WORDS = 50_000
_BLOCK = 1000  # rows that are drawn at once, among which the duplicates of a row are
_SHARE = 20  # one row of 20 is an exact duplicate, and one is a near duplicate
_QUESTIONS = 1000
_QUESTION_WORDS = 30
_CHANGED = 3  # words of a near duplicate


@dataclass(frozen=True)
class Workload:
    """Rows of `words` words in a file of JSON lines, and a file of evaluation questions.

    duplicates: the number of exact duplicates, and of near duplicates. contaminated: rows with a question.
    """

    rows: Path
    evaluation: Path
    count: int
    words: int
    duplicates: int
    contaminated: int


def write_workload(directory: Path, *, count: int, words: int, seed: int = 0) -> Workload:
    """Write both files. Words are drawn by Zipf's law with exponent 1, as in natural texts.

    Raises `ValueError` for fewer rows than a block has, and for rows that are too short for a question.
    """
    if count < _BLOCK or words < 2 * _QUESTION_WORDS:
        raise ValueError(
            f"--rows {count}, --words {words}: want at least {_BLOCK} rows of {2 * _QUESTION_WORDS} words"
        )
    draw = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lengths = draw.integers(2, 10, _WORDS)
    vocabulary = np.array(["".join(draw.choice(letters, length)) for length in lengths], object)
    questions = _texts(draw, vocabulary, _QUESTIONS, _QUESTION_WORDS)
    rows, evaluation = directory / "rows.jsonl", directory / "evaluation.jsonl"
    write_pieces(evaluation, (json.dumps({"question": " ".join(words)}) + "\n" for words in questions))
    blocks = count // _BLOCK
    write_pieces(rows, _rows(draw, vocabulary, questions, blocks, words))
    return Workload(rows, evaluation, blocks * _BLOCK, words, blocks * _BLOCK // _SHARE, blocks)


def _rows(
    draw: np.random.Generator, vocabulary: np.ndarray, questions: np.ndarray, blocks: int, words: int
) -> Iterator[str]:
    copies = _BLOCK // _SHARE
    for block in range(blocks):
        texts = _texts(draw, vocabulary, _BLOCK, words)
        texts[copies : 2 * copies] = texts[:copies]
        texts[3 * copies : 4 * copies] = texts[2 * copies : 3 * copies]
        for row in texts[3 * copies : 4 * copies]:
            row[draw.integers(words // 2, words, _CHANGED)] = draw.choice(vocabulary, _CHANGED)
        texts[-1, -_QUESTION_WORDS:] = questions[block % _QUESTIONS]
        for row in texts[draw.permutation(_BLOCK)]:
            asked, answered = " ".join(row[: words // 3]), " ".join(row[words // 3 :])
            yield (
                f'{{"messages": [{{"role": "user", "content": "{asked}"}}, '
                f'{{"role": "assistant", "content": "{answered}"}}]}}\n'
            )


def _texts(draw: np.random.Generator, vocabulary: np.ndarray, count: int, words: int) -> np.ndarray:
    """Words, object [count, words]. The probability of the word of rank r is proportional to 1 / r."""
    ranks = np.exp(draw.random((count, words)) * np.log(len(vocabulary))).astype(np.int64) - 1
    return vocabulary[ranks.clip(0)]
