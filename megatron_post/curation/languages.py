"""The step `languages` identifies the language of each response, and drops rows in other languages."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field

from megatron_post.config.section import Distinct
from megatron_post.curation.columns import DROPPED
from megatron_post.curation.row import Row
from megatron_post.curation.step import Batch, Pass, RowPass, Step, Values, View
from megatron_post.synthesis.languages.identify import check_installed, identified
from megatron_post.synthesis.languages.prose import prose_of
from megatron_post.synthesis.languages.table import Code


class Languages(Step):
    """Drops rows whose last response is in another language. Short texts have no language, and are kept."""

    kind: Literal["languages"] = Field(description="selects this step")
    keep: Annotated[tuple[Code, ...], Distinct] = Field(
        (), description="languages whose rows are kept. Empty: all, and the step only writes its column"
    )
    least_confidence: float = Field(
        0.5, ge=0, le=1, description="with less confidence than this, a text has no language"
    )

    def passes(self, *, seed: int) -> Sequence[Pass]:
        check_installed()
        return [
            RowPass(
                name=self.column,
                version=1,
                settings=self.model_dump(mode="json", exclude={"name", "sources"}),
                fields={"language": pa.string(), "confidence": pa.float32(), DROPPED: pa.string()},
                annotate=self._annotate,
            )
        ]

    def report(self, view: View) -> dict[str, Any]:
        """The number of rows in each language, of all rows."""
        counts = Counter(view.read(self.column, ["language"])["language"].to_pylist())
        return {"languages": {code or "none": count for code, count in sorted(
            counts.items(), key=lambda pair: (-pair[1], pair[0] or ""))}}  # fmt: skip

    def _annotate(self, batch: Batch) -> Values:
        found = [self._language(row) for row in batch.rows]
        return {
            "language": [code for code, _ in found],
            "confidence": [confidence for _, confidence in found],
            DROPPED: [
                f"language {code}" if code and self.keep and code not in self.keep else None
                for code, _ in found
            ],
        }

    def _language(self, row: Row) -> tuple[str | None, float | None]:
        guess = identified(prose_of(row.messages[-1].content))
        if guess is None or guess.confidence < self.least_confidence:
            return None, None if guess is None else guess.confidence
        return guess.code, guess.confidence
