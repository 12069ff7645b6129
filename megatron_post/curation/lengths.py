"""The step `lengths` drops rows that are too short or too long."""

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa
from pydantic import Field, model_validator

from megatron_post.config.section import Count
from megatron_post.curation.columns import DROPPED
from megatron_post.curation.row import Row
from megatron_post.curation.step import Pass, RowPass, Step


class Lengths(Step):
    """Drops rows by their length in characters and turns. null: no limit."""

    kind: Literal["lengths"] = Field(description="selects this step")
    least_characters: Count | None = Field(None, description="fewest characters of all texts")
    most_characters: Count | None = Field(None, description="most characters of all texts")
    least_response: Count | None = Field(None, description="fewest characters of the last response")
    most_response: Count | None = Field(None, description="most characters of the last response")
    most_turns: Count | None = Field(None, description="most messages of the user")

    @model_validator(mode="after")
    def _has_effect(self) -> "Lengths":
        limits = (self.least_characters, self.most_characters, self.least_response, self.most_response)
        if limits == (None,) * 4 and self.most_turns is None:
            raise ValueError("it has no limit, so it drops nothing; give one, or remove the step")
        for least, most in (limits[:2], limits[2:]):
            if least and most and least > most:
                raise ValueError(f"the fewest characters, {least}, are more than the most, {most}")
        return self

    def passes(self, *, seed: int) -> Sequence[Pass]:
        return [
            RowPass(
                name=self.column,
                version=1,
                settings=self.model_dump(mode="json", exclude={"name", "sources"}),
                fields={DROPPED: pa.string()},
                annotate=lambda batch: {DROPPED: [self._reason(row) for row in batch.rows]},
            )
        ]

    def _reason(self, row: Row) -> str | None:
        characters = sum(map(len, row.texts))
        response = len(row.messages[-1].text)
        turns = row.example.turns
        if self.least_characters and characters < self.least_characters:
            return "too few characters"
        if self.most_characters and characters > self.most_characters:
            return "too many characters"
        if self.least_response and response < self.least_response:
            return "too short a response"
        if self.most_response and response > self.most_response:
            return "too long a response"
        return "too many turns" if self.most_turns and turns > self.most_turns else None
