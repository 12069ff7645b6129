"""Words of texts and their hashes, and what makes two dialogs equal.

The hashes are xxHash's, so they are equal on every machine and in every release of the library.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

Dialog = Sequence[tuple[str, str]]  # the role and the text of each message

# Scripts that are written without blanks between words. Each of their characters counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_WORD_OR_SYMBOL = re.compile(rf"{_WORD.pattern}|[^\w\s]")

_NUMBER_WORD = (
    "(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|"
    "seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|"
    "million|billion|half|dozen)"
)
# A number in digits with separators, a sign and an ordinal's ending, or in English words ("twenty-five").
_NUMBER = re.compile(
    r"(?:(?<![\w).])[-+\u2212])?\d+(?:[.,/:]\d+)*(?:(?:st|nd|rd|th)\b)?"
    rf"|\b{_NUMBER_WORD}(?:[ -]{_NUMBER_WORD})*\b"
)
_MOST_KNOWN = 1_000_000  # words whose hashes are remembered. Identifiers and numbers are endless


def normalized(text: str) -> str:
    """The text in Unicode's NFC, in lower case, with single blanks between its words."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.casefold().split())


def hash_of(parts: Iterable[str]) -> int:
    """A hash of 64 bits of texts and of where each of them ends."""
    digest = xxhash.xxh3_64()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.intdigest()


def dialog_hash(dialog: Dialog) -> tuple[int, int]:
    """Two hashes of 64 bits that are equal for dialogs of the same roles and the same normalized texts."""
    digest = xxhash.xxh3_128()
    for role, text in dialog:
        for part in (role, normalized(text)):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return divmod(digest.intdigest(), 2**64)


@dataclass(frozen=True)
class PromptKeys:
    """Hashes of the parts of a dialog. They decide whether two similar dialogs are spared.

    masked: the prompt with every number replaced by the same mark.
    """

    prompt: int
    masked: int
    answer: int


def prompt_keys(prompt: Dialog, answer: Dialog) -> PromptKeys:
    asked = [part for role, text in prompt for part in (role, normalized(text))]
    given = [part for role, text in answer for part in (role, normalized(text))]
    return PromptKeys(hash_of(asked), hash_of(_NUMBER.sub("\0", part) for part in asked), hash_of(given))


class WordHashes:
    """Hashes of the words of texts, uint64. A word has the same hash in every text."""

    def __init__(self, *, symbols: bool) -> None:
        """symbols: whether each symbol, such as a comma or a plus, counts as a word."""
        self._pattern = _WORD_OR_SYMBOL if symbols else _WORD
        self._known = _Known()

    def of(self, text: str) -> np.ndarray:
        """The hash of each word in order, uint64 [words]."""
        words = self.spelled(text)
        if len(self._known) > _MOST_KNOWN:
            self._known.clear()
        return np.fromiter(map(self._known.__getitem__, words), np.uint64, len(words))

    def spelled(self, text: str) -> list[str]:
        """The words in order, in lower case and in Unicode's NFKC."""
        if not text.isascii():
            text = unicodedata.normalize("NFKC", text)
        return self._pattern.findall(text.casefold())


class _Known(dict[str, int]):
    """The hashes of words that have been seen, since the hashing of a word takes longer than a look-up."""

    def __missing__(self, word: str) -> int:
        found = self[word] = xxhash.xxh3_64_intdigest(word.encode())
        return found


def ngram_hashes(words: np.ndarray, length: int) -> np.ndarray:
    """The hash of each run of `length` words, uint64. A shorter text has one hash, of all of its words.

    words: uint64 [words], as `WordHashes.of` returns them. A text without words has no hash.
    """
    length = min(length, len(words))
    if not length:
        return np.empty(0, np.uint64)
    hashes = np.zeros(len(words) - length + 1, np.uint64)
    for place in range(length):
        # The multiplication makes the hash depend on the order of the words.
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[place : len(words) - length + 1 + place]
        hashes ^= hashes >> np.uint64(29)
    return hashes
