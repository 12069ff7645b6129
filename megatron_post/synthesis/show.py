"""`megatron-post synthesize show` prints each request and program that led to a row, with its result."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from megatron_post.inference.journal import read_entries
from megatron_post.storage.files import read_lines
from megatron_post.storage.reading import reading
from megatron_post.synthesis.row import readable_messages
from megatron_post.synthesis.task import Event

_ENTRIES = {"program": "a program: ", "wanted": "two answers: ", "tool": "a tool: "}  # by a key of the entry
_STYLES = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}


class _Function(BaseModel):
    name: str
    arguments: Any


class _Call(BaseModel):
    function: _Function


class _Message(BaseModel):
    role: str
    content: str
    reasoning_content: str = ""
    tool_calls: list[_Call] = []
    train: bool = False


class _Origin(BaseModel):
    source: str
    journal: list[Event]


class _Kept(BaseModel):
    """A line of `rows.jsonl`."""

    id: str
    messages: list[_Message]
    provenance: _Origin


class _Lost(_Origin):
    """A line of `dropped.jsonl`."""

    id: str
    step: str
    reason: str
    detail: str
    failed: bool


def show_row(file: str | Path, number: int, *, console: Console) -> None:
    """Print the transcript of a row of `rows.jsonl` or `dropped.jsonl`. number: its line, from 1.

    Raises `ValueError` if there is no such row, or if the journal beside the file lacks an entry.
    """
    path = Path(file)
    values = next(islice(read_lines(path), number - 1, None), None)
    if values is None:
        raise ValueError(f"--row {number}: {path} has fewer rows. The first one is 1")
    with reading(f"{path}:{number}", "a row of a recipe"):
        if "provenance" in values:
            values["messages"] = readable_messages(values)
        row = (_Kept if "provenance" in values else _Lost).model_validate(values)
    origin = row.provenance if isinstance(row, _Kept) else row
    _head(console, f"row {row.id} from {origin.source}")
    _transcript(console, origin.journal, path.parent / "journal", f"{path}:{number}")
    if isinstance(row, _Lost):
        _head(console, f"{'failed' if row.failed else 'dropped'} at {row.step}: {row.reason}")
        _say(console, row.detail)
        return
    _head(console, "the row; what is trained is marked")
    for message in row.messages:
        _print_message(console, message)


def _transcript(console: Console, events: Sequence[Event], journal: Path, place: str) -> None:
    entries = read_entries(journal, {event.key for event in events})
    before: list[_Message] = []
    for number, event in enumerate(events, start=1):
        entry = entries.get(event.key, {})
        what = next((what for key, what in _ENTRIES.items() if key in entry), "")
        what = f"{event.model} is asked: " if event.model else what
        tokens = f", {event.prompt_tokens} + {event.tokens} tokens" if event.model else ""
        _head(console, f"{number}. {event.step}: {what}{event.result or 'nothing came of it'}{tokens}")
        if not event.key:
            continue  # a count of the recipe, or an error in it before the request was sent
        if not entry:
            raise ValueError(f"{place}: {journal} has no entry {event.key}")
        with reading(f"{place}: the entry {event.key}", "an entry of the journal"):
            if event.model:
                before = _print_request(console, entry, before)
            elif "program" in entry:
                _print_program(console, entry)
            elif "tool" in entry:
                _print_tool(console, entry)
            else:
                _print_answers(console, entry)


def _print_request(console: Console, entry: dict[str, Any], before: list[_Message]) -> list[_Message]:
    """Print a request and its reply. Messages that the previous request has too are left out.

    Returns all messages, with the reply.
    """
    request = entry["request"]
    messages = [_Message.model_validate(message) for message in request["messages"]]
    shared = 0
    while shared < min(len(messages), len(before)) and messages[shared] == before[shared]:
        shared += 1
    _say(console, f"(the first {shared} message(s) as above)" if shared else "", "dim")
    for message in messages[shared:]:
        _print_message(console, message)
    sampling = ", ".join(f"{key}={value}" for key, value in request["sampling"].items() if key != "stop")
    _say(console, f"({sampling}, seed={request['seed']})", "dim")
    if "refusal" in entry:
        _say(console, f"refused: {entry['refusal']}", "red")
        return messages
    reply = _Message.model_validate(entry["reply"]["message"])
    _print_message(console, reply)
    return [*messages, reply]


def _print_program(console: Console, entry: dict[str, Any]) -> None:
    program, outcome = entry["program"], entry["outcome"]
    for name, content in program["files"].items():
        _say(console, f"[{name}]", "bold")
        what = "(a script of the recipe)" if "script" in content else "(bytes)"
        _say(console, content if isinstance(content, str) else what)
    _say(console, "$ " + " ".join(program["command"]), "bold")
    for stream in ("stdout", "stderr"):
        _say(console, f"[{stream}]" if outcome[stream] else "", "bold")
        _say(console, outcome[stream])
    _say(console, f"({outcome['kind']}, exit status {outcome['returncode']})", "dim")


def _print_tool(console: Console, entry: dict[str, Any]) -> None:
    values = ", ".join(f"{name}={value}" for name, value in entry["values"].items())
    _say(console, f"[{entry['tool']}: {values}]", "bold")
    _say(console, entry["output"])


def _print_answers(console: Console, entry: dict[str, Any]) -> None:
    for name in ("wanted", "given"):
        _say(console, f"[{name}]", "bold")
        _say(console, entry[name])


def _print_message(console: Console, message: _Message) -> None:
    mark = ", trained" if message.train else ""
    _say(console, f"[{message.role}{mark}]", f"bold {_STYLES.get(message.role, '')}".strip())
    _say(console, message.reasoning_content, "italic")
    _say(console, message.content)
    for call in message.tool_calls:
        _say(console, f"calls {call.function.name}({call.function.arguments})")


def _head(console: Console, text: str) -> None:
    console.rule(Text(text), align="left")


def _say(console: Console, text: str, style: str = "") -> None:
    if text:
        console.print(text, style=style or None, highlight=False, soft_wrap=True)
