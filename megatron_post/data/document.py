"""`Document`, a plain text of continued pre-training, and how a row is read into one."""

from dataclasses import dataclass

from megatron_post.data.dialog import MAX_CHARACTERS, BadRow
from megatron_post.data.row_columns import Columns
from megatron_post.data.row_keys import Keys, text_of
from megatron_post.data.row_marks import MARKS, row_mark


@dataclass(frozen=True, slots=True)
class Document:
    """A text, which is trained unchanged. Raises `BadRow` for a text that is blank, too long or not UTF-8."""

    text: str

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise BadRow("the text is blank: nothing to train on")
        if len(self.text) > MAX_CHARACTERS:
            raise BadRow(f"huge: {len(self.text)} characters, more than {MAX_CHARACTERS}")
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise BadRow(
                f"invalid UTF-8: the text holds a lone surrogate at character {error.start}"
            ) from None

    @property
    def turns(self) -> int:
        """Number of user messages. A document has none."""
        return 0


def read_document(row: Keys, columns: Columns, name: str) -> Document:
    """The document in a row. name: its column. Raises `BadRow`, also for a row that must not be trained."""
    if row_mark(row, skip=columns) is False:
        marks = [f"{key}={row.peek(key)!r}" for key in row.among(MARKS) if key not in columns]
        raise BadRow(f"the row says that it is not trained: {', '.join(marks)}")
    value = columns.value("text", row)
    if value is None:
        raise BadRow(
            f"no column {name!r}; the row has {list(row)}. stage=pretrain trains plain texts; name their "
            "column in the source's `columns`, as {text: content}"
        )
    return Document(text_of(value, name))
