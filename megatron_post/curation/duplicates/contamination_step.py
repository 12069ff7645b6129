"""The step `contamination`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from megatron_post.config.data import Source
from megatron_post.config.section import Count, Distinct, Name, Section
from megatron_post.curation.columns import DROPPED
from megatron_post.curation.duplicates.contamination import SHORTEST, EvaluationNgrams
from megatron_post.curation.duplicates.texts import texts_of
from megatron_post.curation.rows import checksums
from megatron_post.curation.step import Batch, Pass, RowPass, Step, Values, View
from megatron_post.data.dialog import BadRow
from megatron_post.data.rows import local_path, raw_rows


class Evaluation(Section):
    """A dataset that models are evaluated with."""

    name: Name = Field(description="its name in reasons and reports")
    path: Name = Field(description="file, directory, or name of a dataset on the hub")
    split: Name = Field("test", description="split, where there are several")
    subset: Name | None = Field(None, description="configuration of a dataset; null: its default")
    columns: Annotated[tuple[Name, ...], Distinct] = Field(
        (), description="columns whose texts are compared. Empty: all texts of a row, at every depth"
    )


class Contamination(Step):
    """Drops rows that share long n-grams of words with evaluation data."""

    kind: Literal["contamination"] = Field(description="selects this step")
    evaluations: tuple[Evaluation, ...] = Field(min_length=1, description="the datasets of evaluations")
    ngram: Count = Field(13, le=1000, description="words of an n-gram")
    most_rows: Count = Field(
        10,
        description="an n-gram of more evaluation rows belongs to a prompt template, and is not compared",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "Contamination":
        names = [evaluation.name for evaluation in self.evaluations]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"evaluations: {', '.join(twice)} is there twice; give each a name of its own")
        return self

    def passes(self, *, seed: int) -> Sequence[Pass]:
        searched = _Searched(self)
        sources = [_source(evaluation) for evaluation in self.evaluations]
        for source in sources:
            local_path(source)  # a missing file ends the run before the steps before this one have run
        contents = [checksums(source) for source in sources]
        return [
            RowPass(
                name=self.column,
                version=1,
                settings=self.model_dump(mode="json", exclude={"name", "sources"}) | {"contents": contents},
                fields={DROPPED: pa.string(), "evaluation": pa.string(), "shared": pa.string()},
                annotate=searched.annotate,
            )
        ]

    def report(self, view: View) -> dict[str, Any]:
        return _Searched(self).report(view.read(self.column, ["evaluation"])["evaluation"].drop_null())


class _Searched:
    """The evaluations of a step, which are read when they are first needed."""

    def __init__(self, step: Contamination) -> None:
        self._step = step

    @cached_property
    def _ngrams(self) -> EvaluationNgrams:
        found = EvaluationNgrams(self._step.ngram, most_rows=self._step.most_rows)
        for evaluation in self._step.evaluations:
            for number, texts in _texts(evaluation):
                found.add(texts, (evaluation.name, number))
            if found.rows[evaluation.name] == found.too_short[evaluation.name]:
                raise ValueError(
                    f"evaluation {evaluation.name!r}: no text of {evaluation.path} has {SHORTEST} words or "
                    "more, so no row can be compared with it"
                )
        found.finish()
        return found

    def annotate(self, batch: Batch) -> Values:
        found = self._ngrams.first_shared([texts_of(row).dialog for row in batch.rows])
        return {
            DROPPED: [match and f"shares text with {match.row[0]}" for match in found],
            "evaluation": [match and f"{match.row[0]}:{match.row[1]}" for match in found],
            "shared": [match and match.words for match in found],
        }

    def report(self, places: pa.ChunkedArray) -> dict[str, Any]:
        """For each evaluation its rows, those that no row can be compared with, and those that were found."""
        found = Counter(place.rpartition(":")[0] for place in set(places.to_pylist()))
        ngrams = self._ngrams
        return {
            "evaluations": [
                {
                    "name": evaluation.name,
                    "rows": ngrams.rows[evaluation.name],
                    "rows_too_short_to_compare": ngrams.too_short[evaluation.name],
                    "rows_found": found[evaluation.name],
                }
                for evaluation in self._step.evaluations
            ],
            "ngrams_of_templates": ngrams.common,
        }


def _source(evaluation: Evaluation) -> Source:
    return Source(**evaluation.model_dump(exclude={"columns"}))


def _texts(evaluation: Evaluation) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the texts of each row.

    Raises `ValueError` for a row that cannot be decoded, and for a column that no row has.
    """
    seen: set[str] = set()
    for number, where, row in raw_rows(_source(evaluation)):
        if isinstance(row, BadRow) or not isinstance(row, dict):
            raise ValueError(f"evaluation {evaluation.name!r}: {where}: {_reason(row)}")
        columns = evaluation.columns or tuple(row)
        seen |= row.keys() & set(columns)
        yield number, [text for column in columns for text in _strings(row.get(column))]
    if missing := sorted(set(evaluation.columns) - seen):
        raise ValueError(f"evaluation {evaluation.name!r}: no row has the column {', '.join(missing)}")


def _reason(row: Any) -> str:
    return str(row) if isinstance(row, BadRow) else f"a row must be a mapping, not {type(row).__name__}"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
