"""Texts in the columns of input rows."""

from collections.abc import Mapping
from typing import Any


def column(row: Mapping[str, Any], name: str, *, key: str) -> str:
    """The text in a column, or its number as text. Raises `ValueError` if it has neither.

    key: the key of the settings that names the column.
    """
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        found = f"the row has {', '.join(row)}" if name not in row else f"it holds {value!r:.80}"
        raise ValueError(f"settings.{key}={name}: this column has no text: {found}")
    return value.strip()
