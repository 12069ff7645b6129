"""`megatron-post curate show` prints rows of a run with their annotations, and why rows were dropped."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from megatron_post.curation.row import ANNOTATIONS
from megatron_post.curation.selection import KEPT, LEFT, REPORT
from megatron_post.storage.files import read_lines
from megatron_post.storage.reading import did_you_mean, read_object, reading

_STYLES = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}


def show(
    directory: str | Path,
    *,
    topic: str | None,
    source: str | None,
    dropped_by: str | None,
    rows: int,
    console: Console,
) -> None:
    """Print the first rows that match all of the conditions, at most `rows`.

    topic: a coarse or fine label of any step that labels topics. dropped_by: a step, whose dropped rows are
    shown in place of the kept ones. Raises `ValueError` for an unfinished run, and for an unknown step or
    source.
    """
    run = Path(directory)
    report = read_object(run / REPORT, "the report of a finished curation")
    with reading(run / REPORT, "the report of a curation"):
        known = {
            "dropped-by": [step["name"] for step in report["steps"]],
            "source": [each["name"] for each in report["sources"]],
        }
    for option, value in (("dropped-by", dropped_by), ("source", source)):
        if value is not None and value not in known[option]:
            names = ", ".join(known[option])
            hint = did_you_mean(value, known[option])
            raise ValueError(f"--{option} {value}: {run} has {names}{hint}")
    found = _matching(run, topic=topic, source=source, dropped_by=dropped_by)
    is_empty = True
    for row in islice(found, rows):
        is_empty = False
        _print_row(console, row)
    if is_empty:
        _say(console, "no row matches")


def _matching(
    run: Path, *, topic: str | None, source: str | None, dropped_by: str | None
) -> Iterator[dict[str, Any]]:
    path = run / (LEFT if dropped_by else KEPT)
    for number, row in enumerate(read_lines(path), start=1):
        with reading(f"{path}:{number}", "a row of a curation"):
            notes = row[ANNOTATIONS]
            topics = {step.get(level) for step in notes["steps"].values() for level in ("coarse", "fine")}
            is_wanted = (
                (topic is None or topic in topics)
                and (source is None or notes["source"] == source)
                and (dropped_by is None or notes["dropped_by"]["step"] == dropped_by)
            )
        if is_wanted:
            yield row


def _print_row(console: Console, row: dict[str, Any]) -> None:
    notes = row[ANNOTATIONS]
    console.rule(Text(notes["id"]), align="left")
    _say(console, f"from {notes['source']}, {notes['place']}", "dim")
    for name in ("messages", "prompt", "edited", "chosen", "rejected"):
        if name not in row:
            continue
        if name not in ("messages", "prompt"):
            _say(console, f"({name})", "bold")
        for message in row[name]:
            _say(console, f"[{message['role']}]", f"bold {_STYLES.get(message['role'], '')}".strip())
            _say(console, message.get("reasoning_content", ""), "italic")
            _say(console, message["content"])
            for call in message.get("tool_calls", ()):
                _say(console, f"calls {call['function']['name']}({call['function']['arguments']})")
    for name, values in notes["steps"].items():
        _say(console, f"{name}: " + ", ".join(f"{key}={value}" for key, value in values.items()), "dim")
    if "dropped_by" in notes:
        _say(console, "dropped by {step}: {reason}".format(**notes["dropped_by"]), "red")


def _say(console: Console, text: str, style: str = "") -> None:
    if text:
        console.print(text, style=style or None, highlight=False, soft_wrap=True, markup=False)
