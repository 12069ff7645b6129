"""Flattens a config to keys and values, and compares the settings of two starts of a run."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_post.config.identity import Kind, kind_of
from megatron_post.config.schema import Config


@dataclass(frozen=True)
class RunSettings:
    """The settings of one start of a run.

    values: the value of every key. content: for keys that name data, a digest of the data, or None without
    data. Two values of such a key are equal if their digests are, even if the paths differ.
    """

    values: Mapping[str, Any]
    content: Mapping[str, str | None]

    def text(self, key: str) -> str:
        """A value in the form of an override, with the digest of its data."""
        digest = self.content.get(key)
        parts = [] if key not in self.values and digest else [_text(_value(self.values, key))]
        return " ".join([*parts, f"(content {digest:.12})"] if digest else parts)


@dataclass(frozen=True)
class Change:
    """A setting whose value in a resumed run differs from that in its checkpoint."""

    key: str
    before: str
    after: str


def flatten(config: BaseModel, above: str = "") -> dict[str, Any]:
    """Every key of a config, such as "data.sources.0.name", with its value in JSON's types."""
    found: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        key, value = f"{above}{name}", getattr(config, name)
        section, is_list = _section_in(field.annotation)
        if section is None:
            found[key] = _plain(value)
        elif is_list:
            for number, item in enumerate(value):
                found |= flatten(item, f"{key}.{number}.")
        elif value is None:
            found |= dict.fromkeys(schema_keys(section, f"{key}."))
        else:
            found |= flatten(value, f"{key}.")
    return found


def schema_keys(section: type[BaseModel] = Config, above: str = "") -> dict[str, FieldInfo]:
    """Every key that a config may have. `*` stands for the index of an entry in a list."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        inner, is_list = _section_in(field.annotation)
        key = f"{above}{name}"
        found |= {key: field} if inner is None else schema_keys(inner, f"{key}.*." if is_list else f"{key}.")
    return found


def compare(before: RunSettings, after: RunSettings) -> tuple[list[Change], list[Change]]:
    """The changes of settings that are the run's identity, and of settings that are free to change."""
    found: dict[Kind, list[Change]] = {"identity": [], "free": [], "harmless": []}
    for key in sorted({*before.values, *after.values, *(before.content.keys() & after.content.keys())}):
        kind = kind_of(_pattern(key), after.values) or "free"  # a key of another version has no kind
        if not _is_same(key, before, after):
            found[kind].append(Change(key, before.text(key), after.text(key)))
    return found["identity"], found["free"]


def _is_same(key: str, before: RunSettings, after: RunSettings) -> bool:
    # A path may change if the data is the same. Without digests on both sides the paths are compared.
    if key in before.content and key in after.content:
        return before.content[key] == after.content[key]
    return bool(_value(before.values, key) == _value(after.values, key))


def _value(values: Mapping[str, Any], key: str) -> Any:
    """The value of a key, or its default if the key is missing.

    A key that was added to the schema later has a default that means the behaviour before.
    """
    if key in values:
        return values[key]
    field = schema_keys().get(_pattern(key))
    if field is None or field.is_required():
        return None
    section = Config.model_fields[key.partition(".")[0]]
    if section.default is None:
        return None  # without the section none of its keys has a value
    return _plain(field.get_default(call_default_factory=True))


def _plain(value: Any) -> Any:
    """The value in JSON's types, in which a tuple becomes a list."""
    return json.loads(json.dumps(value))


def _pattern(key: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", key)


def _section_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The type of section that a field holds, or None, and whether the field is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for inner in get_args(annotation):
        section, is_list = _section_in(inner)
        if section is not None:
            return section, is_list or get_origin(annotation) is tuple
    return None, False


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
