"""`training_record.json` of a model's directory: the base model, and every step that led to these weights.

The model card is made from it. A run that starts from the directory continues its list of steps.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_post.config.load import parse
from megatron_post.config.section import Line, Section
from megatron_post.convert.publishing.legal import licence_of
from megatron_post.storage.hub import hub_name, model_directory
from megatron_post.storage.reading import read_object

RECORD = "training_record.json"
_EXPECTED = "the training record of a model"


class DataShare(Section):
    """One source of the data of a step. tokens: with repeats, null if they were not counted."""

    name: Line = Field(description="name in `data.sources`")
    tokens: int | None = Field(None, ge=0, description="tokens with repeats")


class Result(Section):
    """One figure of an evaluation."""

    task: Line = Field(description="task")
    metric: Line = Field(description="name of the figure")
    value: float = Field(description="the figure")
    stderr: float | None = Field(None, description="its standard error")
    shots: int | None = Field(None, description="examples in the prompt")
    limit: int | None = Field(None, description="rows of each task that were used. null: all")


class Merged(Section):
    """One model of a merge. steps: those that it does not share with the other models."""

    weight: float = Field(description="weight in the merge")
    steps: tuple["Step", ...] = Field((), description="its own steps")


class Step(Section):
    """A training run, or a merge of models."""

    name: Line = Field(description="stage of a run, or `merge`")
    settings: dict[str, Any] = Field({}, description="settings by their keys in the config")
    data: tuple[DataShare, ...] = Field((), description="sources")
    figures: dict[str, float] = Field({}, description="last figures of the run")
    models: tuple[Merged, ...] = Field((), description="models of a merge")


class Record(Section):
    """How a model was made. results: evaluations of these weights."""

    base_models: tuple[Line, ...] = Field((), description="names on the hub, or of directories")
    license: Line | None = Field(None, description="identifier of the licence on the hub")
    steps: tuple[Step, ...] = Field((), description="in their order")
    results: tuple[Result, ...] = Field((), description="evaluations")

    def text(self) -> bytes:
        """The content of the file."""
        return (json.dumps(self.model_dump(mode="json"), indent=2) + "\n").encode()


def read_record(directory: Path) -> Record | None:
    """The record in a directory, or None if it has none. Raises `ValueError` for a malformed one."""
    path = directory / RECORD
    if not path.is_file():
        return None
    return parse(Record, read_object(path, _EXPECTED), origin=str(path))


def record_of_base(name: str | Path) -> Record:
    """The record of a model from which others are made, without its evaluations.

    name: a directory or a name of the hub. Without a record in its directory, the model is a base model.
    """
    directory = model_directory(name)
    found = read_record(directory)
    if found is not None:
        return found.model_copy(update={"results": ()})
    known = hub_name(directory) or directory.resolve().name
    return Record(base_models=(known,), license=licence_of(directory, known))


def merged_record(records: Sequence[Record], weights: Sequence[float], settings: dict[str, Any]) -> Record:
    """The record of a merge. The steps that all models share stand once, before the merge.

    Otherwise a record would grow exponentially over rounds that each average several models.
    """
    shared = 0
    for steps in zip(*(record.steps for record in records), strict=False):
        if any(step != steps[0] for step in steps):
            break
        shared += 1
    models = tuple(
        Merged(weight=weight, steps=record.steps[shared:])
        for record, weight in zip(records, weights, strict=True)
    )
    licences = dict.fromkeys(record.license for record in records)
    return Record(
        base_models=tuple(dict.fromkeys(name for record in records for name in record.base_models)),
        license=next(iter(licences)) if len(licences) == 1 else None,
        steps=(*records[0].steps[:shared], Step(name="merge", settings=settings, models=models)),
    )
