"""Asks a model about rows. An answer that cannot be read is a failure of its row, and no error."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from megatron_post.curation.row import Row
from megatron_post.curation.step import Batch
from megatron_post.inference.model import Refused
from megatron_post.synthesis.prompts import Prompts

Made = TypeVar("Made")
_ROLES = {"ipython": "tool"}
_MARKS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


class OffScale(ValueError):
    """A judge's answer is not one of those that it was asked for."""


async def ask_about(
    batch: Batch,
    model: str,
    prompt: str,
    parse: Callable[[str], Made],
    *,
    values: Callable[[Row], Mapping[str, Any]] = lambda row: {},
    longest: int | None = None,
) -> list[tuple[Made | None, str | None]]:
    """(the value that `parse` makes of the reply, the reason if there is none) for each row of the batch.

    prompt: name of a template in `prompts/`, which gets the `dialog` as a text and the `values`. parse:
    raises `OffScale`. longest: as in `dialog_text`.
    """
    asked = await batch.tools.model(model, scope=["curate", prompt, _prompts().versions[prompt]])

    async def ask(row: Row) -> tuple[Made | None, str | None]:
        dialog = dialog_text(row, longest=longest)
        text = rendered(prompt, dialog=dialog, **values(row))
        try:
            reply = await asked.ask(text, temperature=0.0, top_p=1.0)
        except Refused as error:
            return None, f"the judge gave no answer: {error.reason}"
        if reply.finish != "stop":
            return None, "the judge's answer is cut off"
        try:
            return parse(reply.text), None
        except OffScale as error:
            return None, str(error)

    return await batch.tools.for_each(batch.rows, ask)


def rendered(prompt: str, **values: Any) -> str:
    """The text of a template in `prompts/`."""
    return _prompts().render(prompt, **values)


def prompt_checksum(prompt: str) -> str:
    """A hash of a template, for the settings of a pass that uses it."""
    return _prompts().checksums[prompt]


def dialog_text(row: Row, *, longest: int | None) -> str:
    """The dialog of a row as a text. That of a preference has its best response.

    longest: characters. A longer dialog loses its middle, because its question and its last response matter
    most.
    """
    parts = []
    for message in row.messages:
        calls = [f"(calls {call.name}: {call.arguments})" for call in message.tool_calls]
        content = "\n".join(filter(None, [message.text, *calls]))
        parts.append(f"[{_ROLES.get(message.role, message.role)}]\n{content}")
    text = "\n\n".join(parts)
    if longest is None or len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n[...]\n{text[len(text) - half :]}"


def marks_in(reply: str, names: Sequence[str]) -> dict[str, bool]:
    """Read a mark for each name from a reply. Its lines read "Name: yes" or "Name: no".

    The last line of a name counts. Raises `OffScale` if a mark is missing or is neither.
    """
    return {name: _mark(reply, name) for name in names}


def line_of(reply: str, name: str) -> str:
    """The value in the last line "Name: value" of a reply. Raises `OffScale` if there is none."""
    pattern = rf"^[\s*_#>-]*{re.escape(name)}[\s*_]*:[\s*_]*(.*?)[\s*_.]*$"
    found = re.findall(pattern, reply, re.IGNORECASE | re.MULTILINE)
    if not found or not found[-1]:
        raise OffScale(f"the judge's answer has no line {name!r}")
    return str(found[-1])


def _mark(reply: str, name: str) -> bool:
    value = line_of(reply, name)
    if value.casefold() not in _MARKS:
        raise OffScale(f"the judge's answer is off the scale: {name}: {value:.40}")
    return _MARKS[value.casefold()]


@lru_cache(maxsize=1)
def _prompts() -> Prompts:
    return Prompts(Path(__file__).parent / "prompts")
