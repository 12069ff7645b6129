"""Reads rows by the mapping in `source.columns`, which names one column per role or a column of messages."""

from typing import Any

from megatron_post.config.data import Source
from megatron_post.data.dialog import BadRow, Message
from megatron_post.data.row_keys import KeyCounts, Keys, text_of

_DIALOG = {"system", "user", "assistant", "history", "end_marker"}
_PREFERENCE = {"system", "user", "chosen", "rejected", "edited", "rating", "end_marker"}
_MESSAGES = {"system", "messages", "tools"}
_STEPS = {"system", "user", "steps", "labels"}
_TEXT = {"text"}
_OPTIONAL = ("system", "edited", "rating")


def check_columns(source: Source) -> None:
    """Raise `ValueError` if `source.columns` cannot make an example."""
    keys = set(source.columns)
    if source.format not in ("auto", "columns"):
        if keys:
            raise ValueError(f"source {source.name!r}: columns go with format=columns, not {source.format}")
    elif keys or source.format == "columns":
        fits = [
            {"user", "assistant"} <= keys <= _DIALOG,
            {"user", "chosen", "rejected"} <= keys <= _PREFERENCE,
            {"messages"} <= keys <= _MESSAGES,
            {"user", "steps", "labels"} <= keys <= _STEPS,
            keys == _TEXT,
        ]
        if not any(fits):
            raise ValueError(
                f"source {source.name!r}: columns {sorted(keys)} make neither a dialog (user, assistant, "
                "and optionally system, history, end_marker, or messages, and optionally system, tools) nor "
                "a preference (user, chosen, rejected, and optionally system, edited, rating, end_marker) "
                "nor labelled steps (user, steps, labels, and optionally system) nor a document (text)"
            )


class Columns:
    """Reads the columns of a row that `source.columns` names.

    by_role: whether it names one column per role, and not a column of messages.
    """

    def __init__(self, source: Source, counts: KeyCounts) -> None:
        self._columns, self._counts = source.columns, counts
        self.by_role = "user" in source.columns
        self._marker = source.columns.get("end_marker", "")
        texts = [column for role, column in source.columns.items() if role != "end_marker"]
        self._first = {part.split(".")[0] for column in texts for part in (column, *column.split("+"))}

    def __contains__(self, key: object) -> bool:
        """Whether the mapping uses a key of the row."""
        return key in self._first

    def text(self, role: str, row: Keys) -> str:
        """The text of a role. Joined columns have a blank line between them.

        Columns of optional roles and some of the joined columns may be absent or null. Raises `BadRow`.
        """
        column = self._columns.get(role)
        if column is None:
            return ""
        paths = [column] if column in row else column.split("+")
        values = [self._reach(path, row) for path in paths]
        if all(value is None for value in values) and role not in _OPTIONAL:
            raise BadRow(f"no column {column!r}; the row has {list(row)}")
        texts = [text_of(v, path).strip() for path, v in zip(paths, values, strict=True) if v is not None]
        return "\n\n".join(filter(None, texts))

    def value(self, role: str, row: Keys) -> Any:
        """The value of a role's column, or None."""
        column = self._columns.get(role)
        return None if column is None else self._reach(column, row)

    def response(self, role: str, row: Keys) -> tuple[Message, ...]:
        """The text of a role as an assistant message, without the end marker."""
        return (Message("assistant", self.text(role, row).removesuffix(self._marker).rstrip()),)

    def _reach(self, path: str, row: Keys) -> Any:
        """The value at a path like "instances.0.output", or None."""
        first, *rest = [path] if path in row else path.split(".")
        value = row.get(first)
        for key in rest:
            if isinstance(value, dict):
                value = value.get(key)
            else:
                is_place = isinstance(value, list) and key.isdigit() and int(key) < len(value)
                value = value[int(key)] if is_place else None
        self._counts.columns[path] = self._counts.columns.get(path, False) or value is not None
        return value
