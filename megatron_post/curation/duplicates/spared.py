"""Similar rows that are no duplicates of each other: other problems, or other answers."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from megatron_post.config.section import Distinct
from megatron_post.curation.duplicates.texts import RowTexts
from megatron_post.curation.duplicates.words import prompt_keys

KEYS = {"prompt": pa.uint64(), "masked": pa.uint64(), "answer": pa.uint64()}
Spare = Annotated[tuple[Literal["numbers", "answers"], ...], Distinct]
SPARE: Any = Field(
    ("numbers",),
    description="similar rows that are all kept. numbers: their prompts differ in numbers alone. answers: "
    "their prompts are equal and their answers differ",
)


@dataclass(frozen=True)
class SpareKeys:
    """The hashes by which pairs of rows are spared, uint64 [n] each, as in `words.PromptKeys`."""

    prompt: np.ndarray
    masked: np.ndarray
    answer: np.ndarray

    @classmethod
    def of(cls, table: pa.Table) -> "SpareKeys":
        """The fields of `KEYS` in a table."""
        return cls(*(table[name].to_numpy() for name in KEYS))

    def take(self, rows: np.ndarray) -> "SpareKeys":
        return SpareKeys(self.prompt[rows], self.masked[rows], self.answer[rows])

    def spared(self, first: np.ndarray, second: np.ndarray, spare: Spare) -> np.ndarray:
        """Whether pairs of rows are no duplicates of each other, bool [pairs]. first, second: row numbers."""
        same_prompt = self.prompt[first] == self.prompt[second]
        found = np.zeros(same_prompt.shape, bool)
        if "numbers" in spare:
            found |= ~same_prompt & (self.masked[first] == self.masked[second])
        if "answers" in spare:
            found |= same_prompt & (self.answer[first] != self.answer[second])
        return found


def keys_of(texts: list[RowTexts]) -> dict[str, np.ndarray]:
    """The fields of `KEYS` for some rows."""
    keys = [prompt_keys(row.prompt, row.answer) for row in texts]
    return {name: np.array([getattr(key, name) for key in keys], np.uint64) for name in KEYS}
