"""The step `topics` gives each row a coarse and a fine label of a taxonomy.

A judge labels rows, or a Llama that was trained on labels of a judge (see `classifier`).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from megatron_post.config.section import Count, Line, Name
from megatron_post.curation.classifier import LABEL_PROMPT, Classifier, Labels, classify
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
    judge: Line | None = Field(None, description="name of the model in `models` that labels the rows")
    classifier: Classifier | None = Field(None, description="a Llama that labels the rows instead")
    longest: Count | None = Field(
        None, description="characters of a dialog that the judge reads. A longer one loses its middle"
    )

    @model_validator(mode="after")
    def _someone_labels(self) -> "Topics":
        if (self.judge is None) == (self.classifier is None):
            raise ValueError("give either judge or classifier")
        return self

    @property
    def models(self) -> Sequence[str]:
        return () if self.judge is None else (self.judge,)

    @property
    def uses_gpus(self) -> bool:
        return self.classifier is not None

    def passes(self, *, seed: int) -> Sequence[Pass]:
        taxonomy = load_taxonomy(self.taxonomy)
        of_model: dict[str, Any] = {"judge": self.judge, "prompt": prompt_checksum(_PROMPT)}
        if self.classifier is not None:
            of_model = {"classifier": self.classifier.checksums(), "prompt": prompt_checksum(LABEL_PROMPT)}
        return [
            RowPass(
                name=self.column,
                version=1,
                settings={
                    "taxonomy": taxonomy.model_dump(mode="json"),
                    "longest": self.longest,
                    **of_model,
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
        found = await self._labels(batch, taxonomy)
        return {
            COARSE: [pair and pair[0] for pair, _ in found],
            FINE: [pair and pair[1] for pair, _ in found],
            FAILED: [reason for _, reason in found],
        }

    async def _labels(self, batch: Batch, taxonomy: Taxonomy) -> list[tuple[Labels | None, str | None]]:
        """(the labels, the reason if there are none) for each row."""
        if self.classifier is not None:
            return classify(batch, self.classifier, taxonomy, longest=self.longest)
        assert self.judge is not None
        topics = taxonomy.lines()

        def parse(reply: str) -> Labels:
            label = line_of(reply, "Topic")
            if (pair := taxonomy.find(label)) is None:
                raise OffScale(f"the judge's answer is no topic of the taxonomy: {label:.80}")
            return pair

        return await ask_about(
            batch, self.judge, _PROMPT, parse, values=lambda row: {"topics": topics}, longest=self.longest
        )
