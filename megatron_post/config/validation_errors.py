"""Turns pydantic's validation errors into lines that name the key, the value and the remedy."""

import difflib
import re
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_post.config.secrets import HIDDEN, is_secret_name
from megatron_post.storage.reading import did_you_mean

_LONGEST = 100  # the number of characters of a value or a key that a message shows
_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text; put it in quotes",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "invalid_key": "a mapping whose keys are texts",
}


def errors_of(error: ValidationError) -> list[ErrorDetails]:
    """The errors that pydantic has found, without lists that are too short only because items are invalid."""
    found = error.errors(include_url=False)
    inside = {item["loc"][:length] for item in found for length in range(len(item["loc"]))}
    return [item for item in found if item["type"] != "too_short" or item["loc"] not in inside]


def error_lines(item: ErrorDetails, model: type[BaseModel]) -> list[str]:
    """The lines for one error of validating `model`."""
    path, section = _located(model, item["loc"])
    dotted = ".".join(path)
    key, value = named(dotted), shown_of(dotted, item["input"])
    if item["type"] == "extra_forbidden":
        return [f"{key}: unknown key (value {value}){_meant(path, section, model)}"]
    if item["type"] == "missing":
        return [f"{key}: missing"]
    if item["type"] == "union_tag_not_found":  # the section has several forms, and does not name one
        return [f"{key}.{item['ctx']['discriminator'].strip(chr(39))}: missing"]
    message = item["msg"].removeprefix("Value error, ").replace("Tuple should", "List should")
    if item["type"] == "value_error":
        return [f"{key}: {line}" if key else line for line in message.splitlines()]
    if item["type"] in _WANTED:
        message = f"Input should be {_WANTED[item['type']]}"
        if item["type"] in ("int_type", "float_type") and isinstance(item["input"], str):
            message += " in decimal digits; quotes, a leading 0, `:` and `_` make it a text"
    elif item["type"] in ("literal_error", "union_tag_invalid"):
        context = item["ctx"]
        names = re.findall("'([^']*)'", context.get("expected") or context["expected_tags"])
        given = str(context.get("tag", item["input"]))
        message = f"Input should be {' or '.join(map(repr, names))}{did_you_mean(given, names)}"
    return [f"{key}: {message} (got {value})"]


def named(key: str) -> str:
    """A dotted key in front of a message about it.

    `redact` takes a text behind a key that is named like a secret and a colon for its value. The note between
    them keeps the message.
    """
    return cut(key) + (" (its value is hidden)" if _is_secret(key) else "")


def shown_of(key: str, value: Any) -> str:
    """The value of a dotted key in a message."""
    return HIDDEN if _is_secret(key) else shown(value)


def _is_secret(key: str) -> bool:
    return any(map(is_secret_name, key.split(".")))


def shown(value: Any) -> str:
    """A value as a message shows it, shortened if it is long."""
    return cut(repr(list(value) if isinstance(value, tuple) else value))


def cut(text: str) -> str:
    """The first 100 characters of a text for a message."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _meant(path: Sequence[str], section: type[BaseModel] | None, model: type[BaseModel]) -> str:
    """A suggestion for a misspelt key, or for a key that belongs to another section."""
    above = "".join(f"{part}." for part in path[:-1])
    here = {name: f"{above}{name}" for name in section.model_fields} if section else {}
    elsewhere = {key.rpartition(".")[2]: key for key in _keys(model)}
    for keys in (here, elsewhere):
        if found := difflib.get_close_matches(path[-1], keys, n=1, cutoff=0.7):
            return f" (did you mean {keys[found[0]]!r}?)"
    return ""


def _located(
    model: type[BaseModel], location: Sequence[int | str]
) -> tuple[list[str], type[BaseModel] | None]:
    """The parts of the key at a pydantic location, and the section that contains the key.

    A location also names the member of a union that was tried, which is not a part of the key.
    """
    path: list[str] = []
    types: list[Any] = [model]
    section: type[BaseModel] | None = None
    for part in location:
        sections = [t for t in types if isinstance(t, type) and issubclass(t, BaseModel)]
        tried = [s for s in sections if len(sections) > 1 and part in _tags(s)]
        if tried:
            types = tried
            continue
        section = sections[0] if len(sections) == 1 else None
        path.append(str(part))
        types = [inner for t in types for inner in _inside(t, part)]
    return path, section


def _inside(kind: Any, part: int | str) -> list[Any]:
    """The types of the value under one part of a key, inside a value of type `kind`."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        return _members(field.annotation) if field else []
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        return _members(arguments[0])
    return _members(arguments[1]) if get_origin(kind) is dict else []


def _members(annotation: Any) -> list[Any]:
    """The types of a union, or a list of the type itself if it is not a union."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) is Union or isinstance(annotation, UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _tags(section: type[BaseModel]) -> tuple[Any, ...]:
    """The values of a section's fields that distinguish it from other members of a union."""
    return tuple(tag for field in section.model_fields.values() for tag in get_args(field.annotation))


def _keys(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Yield every key of the model and its sections, except keys in lists."""
    for name, field in model.model_fields.items():
        yield f"{above}{name}"
        for member in _members(field.annotation):
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from _keys(member, f"{above}{name}.")
