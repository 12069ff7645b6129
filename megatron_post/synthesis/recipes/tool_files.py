"""Requests about an uploaded file that programs read: tables, texts, documents, pages and code."""

import base64
import sys
from pathlib import PurePosixPath
from typing import Any

from pydantic import Field

from megatron_post.config.section import Count, Line
from megatron_post.data.dialog import CODE_INTERPRETER, Message
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Files, Task
from megatron_post.synthesis.tools.core import Toolbox, ToolSettings
from megatron_post.synthesis.tools.scripts import run_script
from megatron_post.synthesis.tools.trajectory import asked_for, check_answer, trajectory

VERSION = 1
MODELS = ("author", "judge")
SANDBOX = True
_SCRIPT = "read_file.py"
_LONGEST_NAME = 255  # bytes, as in the sandbox
_UNKNOWN = 3  # the script's exit status for a kind of file that it cannot read


class Settings(ToolSettings):
    excerpt: Count = Field(6000, description="characters of a file that the author of a request sees")
    tasks: tuple[Line, ...] = Field(
        (
            "summarize",
            "answer a question on",
            "analyze or compute something from",
            "convert or extract a part of",
        ),
        min_length=1,
        description="what requests ask for. One is drawn at random for each file",
    )
    code_tasks: tuple[Line, ...] = Field(
        ("find and correct the bugs of", "optimize", "explain", "write and run a test of"),
        min_length=1,
        description="what requests about Python files ask for",
    )


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    settings = task.settings
    name, content = _file(row)
    files: Files = {name: content}
    excerpt = await _excerpt(task, name, files)
    kind = PurePosixPath(name).suffix[1:].lower()
    kinds = settings.code_tasks if kind == "py" else settings.tasks
    asked = task.prompt("write", file=name, excerpt=excerpt, task=task.random.choice(kinds))
    wanted = asked_for(await task.ask("write", asked))
    request = task.prompt("ask", file=name, request=wanted)
    box = Toolbox(task, settings, (CODE_INTERPRETER,), files)
    found = await trajectory(task, box, task.prompt("solve", request=request, calls=settings.calls), settings)
    if not any(name in code for code in found.codes):
        raise Dropped("no program names the file")
    await check_answer(task, request, found.turns)
    return [
        Row(
            [Message("user", request), *found.turns],
            capability="tools",
            kind=kind + (", corrected" if found.failed else ""),
            tools=box.announced,
            extra={"file": name},
            unique=request,
        )
    ]


def _file(row: dict[str, Any]) -> tuple[str, bytes]:
    """The name and the content of the file of a row.

    Raises `ValueError` for a row without one, and `Dropped` if the sandbox cannot have a file of the name.
    """
    try:
        name, content = row["file"], base64.b64decode(row["base64"], validate=True)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            "the row has no `file` with its content as `base64`: use `input.kind: files`"
        ) from None
    if not isinstance(name, str) or PurePosixPath(name).name != name:
        raise ValueError(f"file: {name!r:.80} is not the name of a file")
    if not name.isprintable() or len(name.encode(errors="replace")) > _LONGEST_NAME:
        raise Dropped("the name of the file is too long or has characters that cannot be printed")
    return name, content


async def _excerpt(task: Task[Settings], name: str, files: Files) -> str:
    """The beginning of the file's text. Raises `Dropped` if it cannot be read."""
    if name.endswith(".py") and (name == _SCRIPT or name.removesuffix(".py") in sys.stdlib_module_names):
        raise Dropped("the file has the name of a module that reads it")
    outcome = await run_script(task, "read", _SCRIPT, files, arguments=(name, str(task.settings.excerpt)))
    if outcome.returncode == _UNKNOWN:
        raise Dropped("files of this kind are not read", name)
    if not outcome.ok:
        raise Dropped("the file cannot be read", outcome.stderr[-300:] or outcome.kind)
    if not outcome.stdout.strip():
        raise Dropped("the file has no text")
    return outcome.stdout
