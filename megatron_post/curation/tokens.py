"""The step `tokens` counts the tokens of rows as `data stats` does, for the table of the mixture."""

from collections.abc import Sequence
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from megatron_post.config.section import Count, Name
from megatron_post.curation.columns import DROPPED
from megatron_post.curation.row import Row
from megatron_post.curation.step import Batch, Pass, RowPass, Step, Values, View
from megatron_post.data.dialog import Dialog, Preference
from megatron_post.data.template import render_batch, render_preferences
from megatron_post.data.tokenizer import Tokenizer, load_tokenizer
from megatron_post.data.units import response_length

CONTEXT, RESPONSE = "context", "response"
_Counts = tuple[float, float]  # tokens in context and in the final response


class Tokens(Step):
    """Counts tokens in Llama 3's chat format, and drops rows that have too many."""

    kind: Literal["tokens"] = Field(description="selects this step")
    tokenizer: Name = Field(description="as tokenizer.path of a training run")
    most: Count | None = Field(None, description="most tokens of a row, such as data.pack_length. null: any")

    @cached_property
    def _loaded(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer)

    @property
    def measures(self) -> Sequence[str]:
        return (CONTEXT, RESPONSE)

    def passes(self, *, seed: int) -> Sequence[Pass]:
        return [
            RowPass(
                name=self.column,
                version=1,
                settings={"tokenizer": self._loaded.fingerprint, "most": self.most},
                fields={CONTEXT: pa.float64(), RESPONSE: pa.float64(), DROPPED: pa.string()},
                kept_only=True,
                annotate=self._annotate,
            )
        ]

    def _annotate(self, batch: Batch) -> Values:
        found = _counts(batch.rows, self._loaded)
        is_long = [self.most is not None and sum(counts) > self.most for counts in found]
        return {
            CONTEXT: [context for context, _ in found],
            RESPONSE: [response for _, response in found],
            DROPPED: ["too many tokens" if long else None for long in is_long],
        }

    def report(self, view: View) -> dict[str, Any]:
        """The tokens of all rows that the step has seen."""
        table = view.read(self.column, [CONTEXT, RESPONSE])
        sums = {name: sum(table[name].drop_null().to_pylist()) for name in (CONTEXT, RESPONSE)}
        return {"tokens": sums[CONTEXT] + sums[RESPONSE], **sums}


def _counts(rows: Sequence[Row], tokenizer: Tokenizer) -> list[_Counts]:
    """The counts of each row. The response of a preference is the mean of its responses."""
    examples = [row.example for row in rows]
    dialogs = [example for example in examples if isinstance(example, Dialog)]
    preferences = [example for example in examples if isinstance(example, Preference)]
    of_dialogs = (
        (len(rendered) - response_length(rendered.roles), response_length(rendered.roles))
        for rendered in render_batch(dialogs, tokenizer)
    )
    of_preferences = (
        (len(prompt), fmean(response_length(response.roles) for response in responses))
        for prompt, responses in render_preferences(preferences, tokenizer)
    )
    return [next(of_dialogs if isinstance(example, Dialog) else of_preferences) for example in examples]
