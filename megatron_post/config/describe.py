"""What pydantic finds wrong with a config, in the config's own terms: key, value, and what to do."""

import difflib
import re
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_post.config.secrets import HIDDEN, is_secret_name
from megatron_post.storage.reading import did_you_mean

_LONGEST = 100  # characters of a value, or of a key, that a message shows
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
    """What pydantic has found, but for lists that are too short only without their wrong items."""
    found = error.errors(include_url=False)
    inside = {item["loc"][:length] for item in found for length in range(len(item["loc"]))}
    return [item for item in found if item["type"] != "too_short" or item["loc"] not in inside]


def describe(item: ErrorDetails, model: type[BaseModel]) -> list[str]:
    """The lines of one error that `model` has found."""
    path, section = _located(model, item["loc"])
    key = cut(".".join(path))
    value = HIDDEN if any(map(is_secret_name, path)) else shown(item["input"])
    if item["type"] == "extra_forbidden":
        return [f"{key}: unknown key (value {value}){_meant(path, section, model)}"]
    if item["type"] == "missing":
        return [f"{key}: missing"]
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


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    return cut(repr(list(value) if isinstance(value, tuple) else value))


def cut(text: str) -> str:
    """A text in a message, without what is behind its first 100 characters."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _meant(path: Sequence[str], section: type[BaseModel] | None, model: type[BaseModel]) -> str:
    """What a misspelt key, or one that stands in another section, may have been meant to be."""
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
    """The key of a pydantic location, and the section that the last part of it is a key of.

    A location also names which member of a union was tried, which is no part of the key.
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
    """The types of what stands under one part of a key in a value of this type."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        return _members(field.annotation) if field else []
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        return _members(arguments[0])
    return _members(arguments[1]) if get_origin(kind) is dict else []


def _members(annotation: Any) -> list[Any]:
    """The types of a union, or the one type that is no union."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) is Union or isinstance(annotation, UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _tags(section: type[BaseModel]) -> tuple[Any, ...]:
    """The values of the fields that distinguish the members of a union."""
    return tuple(tag for field in section.model_fields.values() for tag in get_args(field.annotation))


def _keys(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every key of the sections of a model, outside lists."""
    for name, field in model.model_fields.items():
        yield f"{above}{name}"
        for member in _members(field.annotation):
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from _keys(member, f"{above}{name}.")
