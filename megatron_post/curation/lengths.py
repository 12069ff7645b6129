"""The step `lengths` drops rows that are too short or too long."""

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa
from pydantic import Field, model_validator

from megatron_post.config.section import Count
from megatron_post.curation.columns import DROPPED
from megatron_post.curation.step import ROWS, Batch, Pass, RowPass, Step, Values


class Lengths(Step):
    """Drops rows by their length in characters and turns."""

    kind: Literal["lengths"] = Field(description="selects this step")
    least_characters: Count | None = Field(None, description="fewest characters of all messages. null: any")
    most_characters: Count | None = Field(None, description="most characters of all messages. null: any")
    most_turns: Count | None = Field(None, description="most messages of the user. null: any number")

    @model_validator(mode="after")
    def _has_effect(self) -> "Lengths":
        if self.least_characters is self.most_characters is self.most_turns is None:
            raise ValueError("it has no limit, so it drops nothing; give one, or remove the step")
        if self.least_characters and self.most_characters and self.least_characters > self.most_characters:
            raise ValueError("least_characters is larger than most_characters, so no row is kept")
        return self

    def passes(self, *, seed: int) -> Sequence[Pass]:
        return [
            RowPass(
                name=self.column,
                version=1,
                settings=self.model_dump(mode="json", exclude={"name"}),
                fields={DROPPED: pa.string()},
                annotate=self._annotate,
            )
        ]

    def _annotate(self, batch: Batch) -> Values:
        rows = batch.columns[ROWS]
        pairs = zip(rows["characters"].to_pylist(), rows["turns"].to_pylist(), strict=True)
        return {DROPPED: [self._reason(characters, turns) for characters, turns in pairs]}

    def _reason(self, characters: int, turns: int) -> str | None:
        if self.least_characters and characters < self.least_characters:
            return "too few characters"
        if self.most_characters and characters > self.most_characters:
            return "too many characters"
        return "too many turns" if self.most_turns and turns > self.most_turns else None
