"""A judge's marks of quality: three points for general dialogs, and two for dialogs about code.

They are those of section 4.2.3 of the report: accuracy, instruction following and tone for general English
data, and bugs and the user's intention for code.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pyarrow as pa
from pydantic import Field

from megatron_post.config.section import Count, Line, Section
from megatron_post.curation.columns import FAILED
from megatron_post.curation.judge import ask_about, marks_in, prompt_checksum
from megatron_post.curation.step import Batch, RowPass, Values
from megatron_post.curation.topics import COARSE

CRITERIA: Mapping[str, tuple[str, ...]] = {
    "quality": ("Accuracy", "Instructions", "Tone"),
    "code_quality": ("Free of bugs", "Intent"),
}  # by the prompt that asks for them
MARKS, POINTS, FULL = "marks", "points", "full"


class MarkSettings(Section):
    """How a judge marks rows."""

    judge: Line = Field(description="name of the model in `models` that marks the rows")
    code_sources: tuple[Line, ...] = Field((), description="sources whose rows are marked as code")
    code_topics: tuple[Line, ...] = Field(
        (), description="coarse topics whose rows are marked as code. They need `topics`"
    )
    longest: Count | None = Field(
        None, description="characters of a dialog that the judge reads. A longer one loses its middle"
    )


def marks_pass(name: str, settings: MarkSettings, topics: str | None) -> RowPass:
    """A pass whose fields are MARKS, POINTS and FULL, which are null without an answer.

    These are the names of the criteria that a row meets, the number of criteria, and whether it meets all.
    topics: the column of a step `topics`, or None.
    """
    return RowPass(
        name=name,
        version=1,
        settings={
            **settings.model_dump(mode="json"),
            "prompts": {prompt: prompt_checksum(prompt) for prompt in CRITERIA},
        },
        fields={MARKS: pa.list_(pa.string()), POINTS: pa.int8(), FULL: pa.bool_(), FAILED: pa.string()},
        reads=() if topics is None else (topics,),
        kept_only=True,
        annotate=lambda batch: _annotate(batch, settings, topics),
    )


async def _annotate(batch: Batch, settings: MarkSettings, topics: str | None) -> Values:
    count = len(batch.rows)
    labels = [None] * count if topics is None else batch.columns[topics][COARSE].to_pylist()
    is_code = [
        row.source in settings.code_sources or label in settings.code_topics
        for row, label in zip(batch.rows, labels, strict=True)
    ]
    found: list[tuple[dict[str, bool] | None, str | None]] = [(None, None)] * count
    for prompt, wanted in (("quality", False), ("code_quality", True)):
        places = [place for place in range(count) if is_code[place] == wanted]
        rows = [batch.rows[place] for place in places]
        parse = partial(marks_in, names=CRITERIA[prompt])
        answers = await ask_about(
            replace(batch, rows=rows), settings.judge, prompt, parse, longest=settings.longest
        )
        for place, answer in zip(places, answers, strict=True):
            found[place] = answer
    marks = [marks for marks, _ in found]
    return {
        MARKS: [marks and [name for name, mark in marks.items() if mark] for marks in marks],
        POINTS: [marks and len(marks) for marks in marks],
        FULL: [None if marks is None else all(marks.values()) for marks in marks],
        FAILED: [reason for _, reason in found],
    }
