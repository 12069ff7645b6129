"""docs/config_keys.md: every key of every file of settings, made from the schemas.

python -m tests.config_keys    # after a change of a schema
"""

import html
import json
from collections.abc import Iterator
from typing import Any

from typer.testing import CliRunner

from megatron_post.cli import app
from tests.documentation import ROOT

PAGE = ROOT / "docs/config_keys.md"
KINDS = {
    "run": ("Training run", "`train`, `data pack`, `plan`, `launch` and `bench step` read it."),
    "cluster": ("Cluster", "`launch --cluster` reads it."),
    "round": ("Round", "`round` and `launch round` read it."),
    "chain": ("Chain", "`launch round` reads it too."),
    "generate": ("Generation", "`generate` reads it."),
    "select": ("Selection", "`select` reads it."),
    "merge": ("Merge", "`merge` reads it."),
    "curation": ("Curation", "`curate` reads it."),
    "synthesis": ("Synthesis", "`synthesize run` reads it."),
    "cleaning": ("Cleaning rules", "`cleaning` of a selection names it."),
}
_INTRODUCTION = """# Every key

This page is made from the schemas by `python -m tests.config_keys`. [Files of settings](config.md) says how
such files are read. A heading names the section that has the keys. A `*` in it stands for the number of an
entry in a list, and a name in brackets for the `kind` that has the keys. Keys of `model` follow from
`model.preset` unless they are given. Limits that no real value meets are left out.
"""
_LARGEST_LIMIT = 1000  # larger limits are not shown
_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}


def schema_of(kind: str) -> dict[str, Any]:
    """The JSON schema that `config schema` prints."""
    result = CliRunner().invoke(app, ["config", "schema", kind])
    assert result.exit_code == 0, result.output
    schema: dict[str, Any] = json.loads(result.stdout)
    return schema


def page() -> str:
    """The whole page: a table for each section of each kind of file."""
    parts = [_INTRODUCTION]
    for kind, (title, readers) in KINDS.items():
        parts.append(f"## {title}\n{readers}\n")
        sections: dict[str, list[str]] = {}
        for key, what, default, meaning in keys(schema_of(kind)):
            section, _, name = key.rpartition(".") if not key.endswith(".*") else (key, "", "*")
            sections.setdefault(
                section.rpartition(".")[0], []
            )  # a section comes before the sections inside it
            sections.setdefault(section, []).append(f"| `{name}` | {what} | {default} | {meaning} |")
        for section, rows in ((section, rows) for section, rows in sections.items() if rows):
            heading = [f"### `{section}`"] if section else []
            parts.append(
                "\n".join([*heading, "| key | value | default | meaning |", "|---|---|---|---|", *rows, ""])
            )
    return "\n".join(parts)


def keys(schema: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key, including those of nested sections."""
    seen = {} if schema["title"] == "Config" else {"Config": "a training run"}  # it has its own tables
    return list(_keys(schema, schema.get("$defs", {}), prefix="", seen=seen))


def _keys(
    section: dict[str, Any], known: dict[str, Any], *, prefix: str, seen: dict[str, str]
) -> Iterator[tuple[str, str, str, str]]:
    """Yield the keys below `prefix`. seen: where each section was listed first. It is not listed again."""
    for name, value in section.get("properties", {}).items():
        sections = list(_sections(value, known))
        plain = [option for option in _options(value, known) if "properties" not in option]
        described = sections[0][1].get("description", "") if len(sections) == 1 else "see the keys below"
        meaning = value.get("description") or (described if sections else "")
        default = "required" if name in section.get("required", ()) else ""
        if "default" in value and (not sections or value["default"] is None):
            default = _code(json.dumps(value["default"]))
        if plain or not sections:
            yield prefix + name, " or ".join(dict.fromkeys(map(_type, plain))), default, _cell(meaning)
        for suffix, nested in sections:
            path = f"{prefix}{name}{suffix}"
            if (first := seen.setdefault(nested["title"], path)) != path:
                yield path, f"as {first if ' ' in first else f'`{first}`'}", "", _cell(meaning)
            else:
                yield from _keys(nested, known, prefix=f"{path}.", seen=seen)


def _sections(value: dict[str, Any], known: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sections that a value may be or may be a list of, each with the text between the two keys."""
    options = _options(value, known)
    sections = [option for option in options if "properties" in option]
    for section in sections:
        kind = section["properties"].get("kind", {}).get("const")
        yield (f" ({kind})" if kind and len(sections) > 1 else ""), section
    for option in (option for option in options if "items" in option):
        yield from ((f".*{suffix}", section) for suffix, section in _sections(option["items"], known))


def _options(value: dict[str, Any], known: dict[str, Any]) -> list[dict[str, Any]]:
    """The plain values and sections that a value may be."""
    name = value.get("$ref", "").removeprefix("#/$defs/")
    options = value.get("anyOf") or value.get("oneOf")
    if name:
        return _options(known[name], known)
    return [found for option in options for found in _options(option, known)] if options else [value]


def _type(value: dict[str, Any]) -> str:
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if value.get("type") == "array":
        items = value.get("items", {})
        return "list" if "$ref" in items or not items else f"list of {_type(items)}"
    if value.get("type") == "object":
        return "mapping"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [
        f"{signs[name]} {value[name]:g}" for name in signs if name in value and value[name] <= _LARGEST_LIMIT
    ]
    return " ".join([_TYPES.get(value.get("type", ""), "value"), ", ".join(limits)]).strip()


def _code(text: str) -> str:
    """Text as code in a table's cell, where a bar would otherwise end the cell."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def _cell(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


if __name__ == "__main__":
    PAGE.write_text(page())
