"""Reads the dialogs of input rows."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from megatron_post.config.data import Source
from megatron_post.config.section import Section
from megatron_post.data.dialog import Dialog
from megatron_post.data.row_columns import check_columns
from megatron_post.data.row_formats import example_of_row
from megatron_post.synthesis.languages.identify import check_installed
from megatron_post.synthesis.recipe import Dropped


class DialogSettings(Section):
    """Keys of the recipes whose input rows are dialogs."""

    columns: dict[str, str] = Field(
        default_factory=dict,
        description="the column of each role, as in data.sources. Empty: keys of the row",
    )

    @model_validator(mode="after")
    def _can_be_read(self) -> "DialogSettings":
        check_installed()
        check_columns(_source(self))
        return self


def dialog_of(row: Mapping[str, Any], settings: DialogSettings) -> Dialog:
    """The dialog of a row, in any form that `data pack` reads.

    Raises `Dropped` for a comparison and for a dialog that calls tools, and `BadRow` as `data pack`.
    """
    example = example_of_row(row, _source(settings))
    if not isinstance(example, Dialog):
        raise Dropped("the row is a comparison and no dialog")
    if example.tools or any(m.tool_calls or m.role == "ipython" for m in example.messages):
        raise Dropped("the dialog uses tools")
    return example


def _source(settings: DialogSettings) -> Source:
    return Source(name="input", path="input", columns=settings.columns)
