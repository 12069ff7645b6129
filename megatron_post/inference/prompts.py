"""Reads files of prompts. A prompt may have a known answer and solution."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_post.data.dialog import BadRow, Dialog, Message
from megatron_post.data.row_refusals import template_mark
from megatron_post.data.rows import BadRows
from megatron_post.storage.reading import plain_file, reading

_KEYS = {"prompt", "capability", "answer", "solution"}


@dataclass(frozen=True)
class Prompt:
    """A prompt. number: its line, from 1. messages: the conversation up to the last user message.

    capability: selects the system prompt. answer: the right answer, for a verifier. solution: a right
    response, which can replace a wrong one.
    """

    number: int
    messages: tuple[Message, ...]
    capability: str = ""
    answer: str | None = None
    solution: str | None = None

    def with_system(self, system: Mapping[str, str]) -> tuple[Message, ...]:
        """The messages with the capability's system prompt, unless they have one already.

        system: the system prompt of each capability. "default" is for all other capabilities.
        """
        text = system.get(self.capability, system.get("default"))
        if text is None or self.messages[0].role == "system":
            return self.messages
        return (Message("system", text), *self.messages)


def read_prompts(
    path: str | Path,
    *,
    max_bad_rows: int = 0,
    skip: int = 0,
    limit: int | None = None,
    capabilities: Collection[str] | None = None,
) -> list[Prompt]:
    """Good rows of a JSON Lines file: `{"prompt": text or messages, "capability", "answer", "solution"}`.

    skip, limit: the range of good rows. capabilities: those whose prompts of this range are returned, or None
    for all. A duplicate prompt is a bad row, because it would count twice. Raises
    `TooManyBadRows`, with file, line and reason, if there are more than `max_bad_rows` bad rows. Raises
    `ValueError` if no row is left.
    """
    bad_rows, prompts = BadRows(max_bad_rows, key="max_bad_rows"), []
    lines: dict[str, int] = {}  # the first line of each prompt
    file = plain_file(Path(path), "prompts")
    with reading(file):
        content = file.read_bytes()
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = _prompt(number, line)
            if (first := lines.setdefault(repr((prompt.capability, prompt.messages)), number)) != number:
                raise BadRow(f"asks what line {first} asks")
            prompts.append(prompt)
        except BadRow as error:
            bad_rows.add(file.name, f"{file}:{number}", str(error))
    if not prompts:
        raise ValueError(f'prompts {file}: no prompt in it; a line is {{"prompt": "..."}}')
    chosen = prompts[skip:] if limit is None else prompts[skip : skip + limit]
    if not chosen:
        raise ValueError(f"prompts {file}: skip={skip} leaves none of its {len(prompts)} good rows")
    if capabilities is not None:
        chosen = [prompt for prompt in chosen if prompt.capability in capabilities]
        if not chosen:
            raise ValueError(f"prompts {file}: none has a capability among {sorted(capabilities)}")
    return chosen


def _prompt(number: int, line: bytes) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON in UTF-8: {error}") from None
    if not isinstance(row, dict) or "prompt" not in row:
        raise BadRow("a row must be an object with `prompt`")
    if unknown := sorted(row.keys() - _KEYS):
        raise BadRow(f"unknown keys {unknown}; known are {sorted(_KEYS)}")
    texts = {key: row.get(key) for key in ("capability", "solution")}
    for key, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise BadRow(f"{key} is {type(value).__name__}, not text")
    answer = row.get("answer")
    if answer is not None and (not isinstance(answer, str | int | float) or isinstance(answer, bool)):
        raise BadRow(f"answer is {type(answer).__name__}, neither text nor number")
    return Prompt(
        number,
        _messages(row["prompt"]),
        texts["capability"] or "",
        None if answer is None else str(answer),
        texts["solution"],
    )


def _messages(raw: Any) -> tuple[Message, ...]:
    """The messages of a prompt. With an answer they must form a valid dialog."""
    found = [{"role": "user", "content": raw}] if isinstance(raw, str) else raw
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise BadRow(f"a prompt is a text or a list of messages, not {raw!r:.80}")
    if wrong := next((message for message in found if set(message) != {"role", "content"}), None):
        raise BadRow(f"a message has role and content and no more, not {sorted(map(str, wrong))}")
    if not found or found[-1]["role"] != "user":
        raise BadRow("a prompt ends with a message of the user")
    if not isinstance(found[-1]["content"], str) or not found[-1]["content"].strip():
        raise BadRow("the last message is blank")
    dialog = Dialog((*(Message(m["role"], m["content"]) for m in found), Message("assistant", "?")))
    for message in dialog.messages:
        if mark := template_mark(message.content, role=message.role):
            raise BadRow(
                f"the {message.role} message holds {mark!r}: give the turns of a transcript as messages"
            )
    return tuple(Message(m["role"], m["content"].strip()) for m in found)
