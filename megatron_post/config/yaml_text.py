"""Reads and writes YAML without the surprising conversions of YAML 1.1.

PyYAML reads YAML 1.1, in which 0777 is 511, 1:30 is 90, `no` is false, 1e-5 is a text, and the second of two
equal keys wins. Here a plain value is a number only if it is written in decimal digits. Every other value
that is not true, false or null is a text, and the schema decides whether a text is allowed. Files may come
from anyone, so their size and depth are limited, and tags are refused.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

LARGEST = 2**18  # characters of a document. PyYAML reads about 100,000 per second
MOST_VALUES = 100_000  # values of a document. Those of an alias count each time it is used
DEEPEST = 32  # levels of nested mappings and lists

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


def _plain_value(text: str) -> Any:
    """The value of a text without quotes."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if len(text) <= 400 and _FLOAT.fullmatch(text):
        return float(text)
    return text


def read_yaml(text: str, *, mapping_tags: Collection[str] = ()) -> Any:
    """The value of a document, or None for an empty one. Raises `ValueError` with the line and column.

    mapping_tags: tags, such as "!Template", that a mapping may have. It is read as if it had none.
    """
    return _read(text, mapping_tags)[0]


def read_argument(text: str) -> Any:
    """The value of an argument on a command line.

    `[...]`, `{...}` and quotes are YAML. Any other argument is one plain value, in which ` #` and `: ` have
    no special meaning. Raises `ValueError`.
    """
    if text[:1] not in ("[", "{", '"', "'"):
        return _plain_value(text)
    value, end = _read(text)
    if rest := text[end:].strip():
        raise ValueError(f"{rest!r} follows the end of the value; put the whole value in quotes")
    return value


def write_yaml(value: Any) -> str:
    """The YAML text of a value of mappings, lists, texts, numbers, booleans and None, for `read_yaml`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that would be read as a value of another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, data: str) -> yaml.Node:
        style = None if isinstance(_plain_value(data), str) else "'"
        if not data.isprintable():
            style = '"'  # only this style keeps line separators, and PyYAML does not always choose it
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.text)


def _read(text: str, mapping_tags: Collection[str] = ()) -> tuple[Any, int]:
    """The value, and the position after its end."""
    if len(text) > LARGEST:
        raise ValueError(f"it has {len(text):,} characters, and no more than {LARGEST:,} are read")
    try:
        return _Document(yaml.parse(text, Loader=yaml.SafeLoader), mapping_tags).read()
    except yaml.MarkedYAMLError as error:
        context = f"{error.context}: " if error.context else ""
        tabs = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
        raise _problem(error.problem_mark or error.context_mark, f"{context}{error.problem}{tabs}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: the character {chr(error.character)!a} is not allowed") from None


class _Document:
    """Builds one value from the events of a parser."""

    def __init__(self, events: Iterator[Any], mapping_tags: Collection[str] = ()) -> None:
        self._events, self._mapping_tags = events, mapping_tags
        self._count = self._end = 0
        self._anchors: dict[str, tuple[Any, int]] = {}  # anchor -> (value, number of values in it)

    def read(self) -> tuple[Any, int]:
        next(self._events)  # the start of the stream
        if isinstance(next(self._events), StreamEndEvent):
            return None, 0
        value = self._value(self._next(), depth=1)
        next(self._events)  # the end of the document
        after = next(self._events)
        if isinstance(after, DocumentStartEvent):
            raise _problem(after.start_mark, "a second document begins; only one is read")
        return value, self._end

    def _next(self) -> Any:
        event = next(self._events)
        self._end = event.end_mark.index
        return event

    def _value(self, event: Any, *, depth: int) -> Any:
        before = self._count
        self._add(1, event)
        if isinstance(event, AliasEvent):
            if event.anchor not in self._anchors:
                raise _problem(event.start_mark, f"the alias *{event.anchor} has no finished value before it")
            value, size = self._anchors[event.anchor]
            self._add(size, event)
            return value
        is_known = isinstance(event, MappingStartEvent) and event.tag in self._mapping_tags
        if event.tag is not None and not is_known:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _problem(event.start_mark, f"the tag {tag} is refused; write the value without it")
        # Without this limit, deeply nested values would exceed Python's limit of recursion.
        if depth > DEEPEST:
            raise _problem(event.start_mark, f"more than {DEEPEST} nested mappings and lists")
        if isinstance(event, ScalarEvent):
            value = _plain_value(event.value) if event.style is None else event.value
        elif isinstance(event, SequenceStartEvent):
            value = list(self._items(depth))
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, self._count - before)
        return value

    def _items(self, depth: int) -> Iterator[Any]:
        while not isinstance(event := self._next(), SequenceEndEvent):
            yield self._value(event, depth=depth + 1)

    def _mapping(self, depth: int) -> dict[str, Any]:
        """A mapping. Its keys are always texts, even `on` and 1."""
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := self._next(), MappingEndEvent):
            if not isinstance(event, ScalarEvent) or event.tag is not None:
                raise _problem(event.start_mark, "a key must be a plain word")
            key, line = event.value, event.start_mark.line + 1
            if key == "<<" and event.style is None:
                raise _problem(event.start_mark, "the merge key << is refused; inherit with `base:`")
            if key in lines:
                raise _problem(
                    event.start_mark,
                    f"the key {key!r} already appears in line {lines[key]}; keep one of them",
                )
            lines[key] = line
            found[key] = self._value(self._next(), depth=depth + 1)
        return found

    def _add(self, count: int, event: Any) -> None:
        self._count += count
        if self._count > MOST_VALUES:
            raise _problem(
                event.start_mark, f"more than {MOST_VALUES:,} values, counting each use of an alias"
            )


def _problem(mark: Any, text: str) -> ValueError:
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return ValueError(where + (text if len(text) <= 300 else f"{text[:300]}..."))
