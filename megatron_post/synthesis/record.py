"""The record of a run's settings, recipe and input. A restart compares it to find what has changed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_post.config.secrets import redact
from megatron_post.data.rows import BadRows
from megatron_post.storage.files import write_json
from megatron_post.storage.reading import read_object
from megatron_post.synthesis.inputs import read_input
from megatron_post.synthesis.recipe import Prepared, Recipe
from megatron_post.synthesis.settings import Synthesis
from megatron_post.synthesis.summary import Summary

_LONGEST = 60  # characters of a value that is printed


def record_of(settings: Synthesis, recipe: Recipe, prepared: Prepared | None) -> dict[str, Any]:
    """Everything that determines the rows. This reads the whole input once, before the first request.

    Raises `ValueError` if the input cannot be read, if it has too many bad rows (`TooManyBadRows`), or if no
    row is left.
    """
    bad_rows, checksum, rows = BadRows(settings.max_bad_rows, key="max_bad_rows"), hashlib.sha256(), 0
    for row in read_input(settings.input, bad_rows=bad_rows):
        checksum.update(row.id.encode())
        rows += 1
    if rows == 0:
        raise ValueError(f"input: {settings.input.path} has no row that is taken")
    return {
        "settings": json.loads(settings.model_dump_json()),
        "recipe": {
            "name": recipe.name,
            "version": recipe.version,
            "files": recipe.checksums,
            **({"generations": True} if recipe.generations else {}),
            **({"prepared": prepared.checksum} if prepared else {}),
        },
        "input": {
            "rows": rows,
            "checksum": checksum.hexdigest(),
            "bad_rows": bad_rows.count,
            "bad_examples": bad_rows.examples,
        },
    }


def summary_of(record: dict[str, Any]) -> Summary:
    """The summary of a run before its first row is finished."""
    recipe, found = record["recipe"], record["input"]
    return Summary(
        recipe=recipe["name"],
        version=recipe["version"],
        input=None if recipe.get("generations") else found["rows"],
        bad=found["bad_rows"],
        bad_examples=found["bad_examples"],
    )


def update_record(path: Path, record: dict[str, Any]) -> list[str]:
    """Write the record of this start. Returns a line for each value that differs from the last start."""
    earlier = read_object(path, "the record of a run of a recipe") if path.exists() else record
    if not path.exists() or earlier != record:
        write_json(path, record)
    before, now = dict(_flat(earlier)), dict(_flat(record))
    return [
        f"{key}: {_shown(before, key)} -> {_shown(now, key)}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{name}.{key}".lstrip("."))]
    return [(name, value)]


def _shown(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return "(none)"
    text = redact(json.dumps(values[key]))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
