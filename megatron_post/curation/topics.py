"""The step `topics` gives each row a coarse and a fine label of a taxonomy.

A judge labels rows, or a Llama that was trained on labels of a judge (see `classifier`).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from megatron_post.config.section import Count, Line, Name
from megatron_post.curation.columns import FAILED
from megatron_post.curation.judge import OffScale, ask_about, line_of, prompt_checksum
from megatron_post.curation.step import ROWS, Batch, Pass, RowPass, Step, Values, View
from megatron_post.curation.taxonomy import Taxonomy, load_taxonomy

COARSE, FINE = "coarse", "fine"
_PROMPT = "topic"


class Topics(Step):
    """Labels rows by topic. A row whose label is not known has none, and is kept."""

    kind: Literal["topics"] = Field(description="selects this step")
    taxonomy: Name = Field(description="YAML file of topics, such as configs/curation/topics.yaml")
    judge: Line = Field(description="name of the model in `models` that labels the rows")
    longest: Count | None = Field(
        None, description="characters of a dialog that the judge reads. A longer one loses its middle"
    )

    @property
    def models(self) -> Sequence[str]:
        return (self.judge,)

    def passes(self, *, seed: int) -> Sequence[Pass]:
        taxonomy = load_taxonomy(self.taxonomy)
        return [
            RowPass(
                name=self.column,
                version=1,
                settings={
                    "taxonomy": taxonomy.model_dump(mode="json"),
                    "judge": self.judge,
                    "longest": self.longest,
                    "prompt": prompt_checksum(_PROMPT),
                },
                fields={COARSE: pa.string(), FINE: pa.string(), FAILED: pa.string()},
                kept_only=True,
                annotate=lambda batch: self._annotate(batch, taxonomy),
            )
        ]

    def report(self, view: View) -> dict[str, Any]:
        """The number of rows of each topic and source, of the rows that the step has seen."""
        labels = view.read(self.column, [COARSE, FINE])
        sources = view.read(ROWS, ["source"])["source"]
        triples = zip(labels[COARSE].to_pylist(), labels[FINE].to_pylist(), sources.to_pylist(), strict=True)
        counts = Counter(triples)
        taxonomy = load_taxonomy(self.taxonomy)
        names = dict.fromkeys(sources.to_pylist())
        return {
            "topics": [
                {"coarse": coarse, "fine": fine, "rows": {name: counts[coarse, fine, name] for name in names}}
                for coarse, fine in taxonomy.pairs
            ]
        }

    async def _annotate(self, batch: Batch, taxonomy: Taxonomy) -> Values:
        topics = taxonomy.lines()

        def parse(reply: str) -> tuple[str, str]:
            label = line_of(reply, "Topic")
            if (pair := taxonomy.find(label)) is None:
                raise OffScale(f"the judge's answer is no topic of the taxonomy: {label:.80}")
            return pair

        found = await ask_about(
            batch, self.judge, _PROMPT, parse, values=lambda row: {"topics": topics}, longest=self.longest
        )
        return {
            COARSE: [pair and pair[0] for pair, _ in found],
            FINE: [pair and pair[1] for pair, _ in found],
            FAILED: [reason for _, reason in found],
        }
