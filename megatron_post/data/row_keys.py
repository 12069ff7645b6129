"""Records which keys of a row are read. Unread keys are counted, so that no data is lost silently."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_post.data.dialog import BadRow


class Keys:
    """A mapping in a row that records which of its keys were read. A null value counts as absent.

    place: the path of the mapping, "" for the row and "messages." for a message. ignore: the keys of the
    source's `ignore`, which are skipped here and in nested mappings.
    """

    def __init__(self, values: Mapping[str, Any], *, place: str = "", ignore: Collection[str] = ()) -> None:
        self._values = {k: v for k, v in values.items() if v is not None and k not in ignore}
        self._place, self._ignore = place, ignore
        self._read: set[str] = set()
        self._nested: list[Keys] = []

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def get(self, name: str) -> Any:
        """The value, or None. The key counts as used from now on."""
        self._read.add(name)
        return self._values.get(name)

    def require(self, name: str) -> Any:
        """The value, as `get` returns it. Raises `BadRow` if the key is absent or null."""
        if name not in self._values:
            raise BadRow(f"no column {name!r}; the row has {list(self._values)}")
        return self.get(name)

    def one_of(self, *names: str) -> Any:
        """The value under one of these names, or None. Raises `BadRow` if two of them differ."""
        found = {name: self.get(name) for name in names if name in self._values}
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            raise BadRow(f"{' and '.join(f'`{name}`' for name in found)} contradict each other")
        return values[0] if values else None

    def has_value(self, name: str) -> bool:
        """Whether there is a value that is not blank. A blank value counts as used, as it holds no data."""
        if name not in self._values:
            return False
        # A blank value holds no data, so it need not be reported as unused.
        if is_blank(self._values[name]):
            self._read.add(name)
            return False
        return True

    def is_used(self, name: str) -> bool:
        """Whether the key has been read."""
        return name in self._read

    def among(self, names: Collection[str]) -> list[str]:
        """The names that the mapping has. It loops over the mapping because `names` may be much longer."""
        return [name for name in self._values if name in names]

    def peek(self, name: str) -> Any:
        """The value, or None. The key does not count as used."""
        return self._values.get(name)

    def nested(self, values: Mapping[str, Any], place: str) -> "Keys":
        """`Keys` of a mapping inside this one."""
        keys = Keys(values, place=self._place + place, ignore=self._ignore)
        self._nested.append(keys)
        return keys

    def unused(self) -> set[str]:
        """The names of all keys that nothing has read, with their place."""
        own = {self._place + name for name in self._values if name not in self._read}
        return own.union(*(keys.unused() for keys in self._nested))


@dataclass
class KeyCounts:
    """The unused keys of a source's good rows, and the columns of `source.columns` that no row has.

    unused: the number of rows by key. columns: whether any row has had the column, for each column.
    """

    MOST_NAMED: ClassVar[int] = 50

    unused: Counter[str] = field(default_factory=Counter)
    columns: dict[str, bool] = field(default_factory=dict)

    def summary(self) -> list[str]:
        """Lines to print, or none if all keys are used and all columns exist."""
        lines = []
        if self.unused:
            counted = self.unused.most_common(self.MOST_NAMED)
            named = [f"{key:.80} ({count:,} row{'s' * (count > 1)})" for key, count in counted]
            others = len(self.unused) - len(named)
            more = f", and {others:,} others" if others else ""
            lines.append(f"keys not used: {', '.join(named)}{more}")
        if missing := [name for name, seen in self.columns.items() if not seen]:
            lines.append(f"columns that no row has: {', '.join(missing)}")
        return lines


def is_blank(value: Any) -> bool:
    """Whether a value is null, empty or only white space."""
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def from_json(value: Any, name: str) -> Any:
    """The value, parsed as JSON if it is a text. A blank one gives None. Raises `BadRow` for invalid JSON."""
    if is_blank(value) or not isinstance(value, str):
        return None if is_blank(value) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{name} are not JSON: {error}") from None


def as_list(value: Any) -> Any:
    """A mapping of lists as a list of mappings. Other values are returned unchanged.

    `datasets` gives features of type `Sequence` as a mapping of lists.
    """
    if not isinstance(value, Mapping) or not all(isinstance(inner, list) for inner in value.values()):
        return value
    lengths = {len(inner) for inner in value.values()}
    if len(lengths) != 1:
        return value
    return [dict(zip(value, inner, strict=True)) for inner in zip(*value.values(), strict=True)]


def messages_in(text: str) -> list[Any] | None:
    """The messages of a text that is the JSON of a list of messages with role and content, or None."""
    if not text.lstrip().startswith("[") or not ('"role"' in text or '"from"' in text):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if found and all(map(_is_message, found)) else None


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and any(
        isinstance(value.get(role), str) and content in value
        for role, content in (("role", "content"), ("from", "value"))
    )


def text_of(value: Any, name: str) -> str:
    """The value, if it is a text. Raises `BadRow` if it is not."""
    if not isinstance(value, str):
        raise BadRow(f"{name!r} is {type(value).__name__}, not text")
    return value
