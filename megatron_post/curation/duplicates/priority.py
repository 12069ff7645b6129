"""Which of several duplicates is kept."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import AfterValidator, Field

from megatron_post.config.section import Distinct, Line
from megatron_post.curation.step import ROWS, Step, View


def _names_a_field(text: str) -> str:
    step, _, field = text.partition(".")
    if not step or not field:
        raise ValueError(f"{text!r}: write STEP.FIELD, such as quality.score")
    return text


FieldOfStep = Annotated[Line, AfterValidator(_names_a_field)]


class Duplicates(Step):
    """Base class of the steps that keep one of several rows."""

    order_by: Annotated[tuple[FieldOfStep, ...], Distinct] = Field(
        (),
        description="fields of earlier steps, such as quality.score. Of several duplicates the row with the "
        "largest product is kept. Empty, and for equal products: the first row of the first source",
    )

    @property
    def needs(self) -> Sequence[str]:
        return list(dict.fromkeys(name.partition(".")[0] for name in self.order_by))

    @property
    def needed_fields(self) -> Sequence[tuple[str, str]]:
        return [tuple(name.split(".", 1)) for name in self.order_by]  # type: ignore[misc]

    def order(self, view: View) -> np.ndarray:
        """The rows from the one that is kept first to the one that is kept last, int64 [rows].

        Raises `ValueError` for a field that is no number, and for negative numbers in one of several fields.
        """
        columns = [_numbers(view, *name.split(".", 1)) for name in self.order_by]
        for name, column in zip(self.order_by, columns, strict=True):
            if len(columns) > 1 and (column < 0).any():
                raise ValueError(
                    f"order_by: {name} has negative values, such as {np.nanmin(column):g}, so a product with "
                    "other fields does not order the rows; name a field from 0 on, or this field alone"
                )
        return order_by_priority(view.num_rows, columns)


def order_by_priority(count: int, columns: Sequence[np.ndarray] = ()) -> np.ndarray:
    """The rows from the one that is kept first to the one that is kept last, int64 [count].

    columns: float [count] each. Rows with the larger product come first, and rows with a missing value (NaN)
    come last. Equal rows, and all rows if there are no columns, stay in the order of the sources.
    """
    if not columns:
        return np.arange(count)
    product = np.prod(np.stack([np.asarray(column, np.float64) for column in columns]), axis=0)
    return np.argsort(np.where(np.isnan(product), np.inf, -product), kind="stable")


def reasons(is_dropped: np.ndarray, reason: str) -> pa.Array:
    """The values of the field `dropped`. is_dropped: bool [rows]."""
    return pa.array([reason if dropped else None for dropped in is_dropped.tolist()], pa.string())


def row_names(view: View, rows: np.ndarray) -> pa.Array:
    """The ids of rows in hexadecimal, null where a row is -1."""
    return names_of(row_ids(view), rows)


def row_ids(view: View) -> np.ndarray:
    """The ids of all rows, uint8 [rows, 16]."""
    parts = [table["id"].combine_chunks() for _, table in view.parts(ROWS, ["id"])]
    ids = [np.frombuffer(b"".join(part.to_pylist()), np.uint8) for part in parts]
    return np.concatenate([np.empty(0, np.uint8), *ids]).reshape(-1, 16)


def names_of(ids: np.ndarray, rows: np.ndarray) -> pa.Array:
    """The ids of rows in hexadecimal, null where a row is -1. ids: uint8 [n, 16]."""
    return pa.array([None if row < 0 else ids[row].tobytes().hex() for row in rows.tolist()], pa.string())


def _numbers(view: View, step: str, field: str) -> np.ndarray:
    """A field as float64, NaN for null. Raises `ValueError` if it is no number."""
    column = view.read(step, [field])[field]
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"order_by: {step}.{field} is no number but {kind}")
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
