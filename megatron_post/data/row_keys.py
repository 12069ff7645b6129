"""Which keys of a row are used. What nothing reads is counted: it does not vanish in silence."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron_post.data.dialog import BadRow


class Keys:
    """A mapping in a row that remembers which of its keys were read. A key that is null counts as absent.

    place: where the mapping stands, "" for the row and "messages." for a message. ignore: keys that the
    source wants to be passed over, here and in what is nested.
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
        """The value, or None; the key counts as used from now on."""
        self._read.add(name)
        return self._values.get(name)

    def require(self, name: str) -> Any:
        """As `get`. Raises `BadRow` if the key is absent or null."""
        if name not in self._values:
            raise BadRow(f"no column {name!r}; the row has {list(self._values)}")
        return self.get(name)

    def one_of(self, *names: str) -> Any:
        """The value that goes by one of these names, or None. Raises `BadRow` if two of them differ."""
        found = {name: self.get(name) for name in names if name in self._values}
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            raise BadRow(f"{' and '.join(f'`{name}`' for name in found)} contradict each other")
        return values[0] if values else None

    def says(self, name: str) -> bool:
        """Whether there is a value that is not blank. A blank one counts as used: it says nothing."""
        if name not in self._values:
            return False
        if is_blank(self._values[name]):
            self._read.add(name)
            return False
        return True

    def is_used(self, name: str) -> bool:
        """Whether the key has been read."""
        return name in self._read

    def among(self, names: Collection[str]) -> list[str]:
        """Those of the names that the mapping has, which are few where the names are many."""
        return [name for name in self._values if name in names]

    def peek(self, name: str) -> Any:
        """The value, or None, without using it."""
        return self._values.get(name)

    def nested(self, values: Mapping[str, Any], place: str) -> "Keys":
        """The keys of a mapping inside this one."""
        keys = Keys(values, place=self._place + place, ignore=self._ignore)
        self._nested.append(keys)
        return keys

    def unused(self) -> set[str]:
        """Names, with their place, of all keys that nothing has read."""
        own = {self._place + name for name in self._values if name not in self._read}
        return own.union(*(keys.unused() for keys in self._nested))


@dataclass
class KeyCounts:
    """What the good rows of a source held while nothing used it, and what `source.columns` names in vain.

    unused: rows by key. columns: whether a row had the column, for those that a row may lack.
    """

    MOST_NAMED: ClassVar[int] = 50

    unused: Counter[str] = field(default_factory=Counter)
    columns: dict[str, bool] = field(default_factory=dict)

    def summary(self) -> list[str]:
        """Lines for people, none where there is nothing to say."""
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
    """Whether a value says nothing: null, empty or white space."""
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def from_json(value: Any, name: str) -> Any:
    """The value, read as JSON if it is a text. Blank counts as None. Raises `BadRow` if it is no JSON."""
    if is_blank(value) or not isinstance(value, str):
        return None if is_blank(value) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{name} are not JSON: {error}") from None


def as_list(value: Any) -> Any:
    """The list of mappings that `datasets` gives as a mapping of lists, for features of type `Sequence`.

    Other values as they are.
    """
    if not isinstance(value, Mapping) or not all(isinstance(inner, list) for inner in value.values()):
        return value
    lengths = {len(inner) for inner in value.values()}
    if len(lengths) != 1:
        return value
    return [dict(zip(value, inner, strict=True)) for inner in zip(*value.values(), strict=True)]


def messages_in(text: str) -> list[Any] | None:
    """The messages whose JSON a text is, in which each has a role and a content; None for another text."""
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
    """The value. Raises `BadRow` if it is no text."""
    if not isinstance(value, str):
        raise BadRow(f"{name!r} is {type(value).__name__}, not text")
    return value
