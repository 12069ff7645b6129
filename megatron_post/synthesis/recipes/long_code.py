"""Repositories without a file that many others import: which files import it, and the file itself."""

import json
import random
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from megatron_post.config.section import Count, Line
from megatron_post.data.dialog import Message
from megatron_post.inference.request import Reply
from megatron_post.synthesis.code.own_tests import OwnTests
from megatron_post.synthesis.code.programs import block_in, fenced, program_in
from megatron_post.synthesis.code.scripts import parse_python, script
from megatron_post.synthesis.code.similarity import labels_of, similarity
from megatron_post.synthesis.long.tokens import LongSettings, measured
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.replies import unless_refused
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Files, Task

VERSION = 1
SANDBOX = True
_SPARE = 1024  # tokens beside the files and the answer: headers, the questions and the list of files


class Settings(LongSettings):
    importers: Count = Field(5, description="files that must import a module")
    modules: Count = Field(1, description="modules of a repository, drawn at random, of which one is missing")
    tries: Count = Field(3, description="replies to each question, of which the first right one is kept")
    least: float = Field(
        0.3, ge=0, le=1, description="similarity of the code's syntax tree to the file's own"
    )
    tests: tuple[Line, ...] = Field(
        (), description="command that runs a repository's tests where it has some, such as pytest -q"
    )


@dataclass(frozen=True)
class _Missing:
    """A module that is taken away. names: of it, which its importers use. shown: paths of the context."""

    path: str
    importers: list[str]
    names: list[str]
    shown: list[str]


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    name, files = row.get("repository"), row.get("files")
    if not isinstance(name, str) or not isinstance(files, dict):
        raise ValueError("a row needs `repository` and `files`, as input.kind=repositories gives them")
    for _ in row.get("left_out") or ():
        task.count("parse", "a file is no text")
    modules = await _modules(task, name, files)
    drawn = task.random.sample(sorted(modules), min(task.settings.modules, len(modules)))
    missing = [
        _Missing(path, **modules[path], shown=_shown(task, files, path, modules[path])) for path in drawn
    ]
    works = (_rows(task, name, files, each) for each in missing if each.shown)
    if all(not each.shown for each in missing):
        raise Dropped("the files that import the module do not fit the largest bucket")
    rows = [row for rows in await unless_refused(task, *works) if rows for row in rows]
    if not rows:
        raise Dropped("no answer on the repository passes the checks")
    return rows


async def _modules(task: Task[Settings], name: str, files: dict[str, str]) -> dict[str, dict[str, list[str]]]:
    """Modules that enough files import, with these files and the names that they use."""
    program: Files = {
        "repository.py": script("repository.py"),
        "definitions.py": script("definitions.py"),
        "files.json": json.dumps({path: text for path, text in files.items() if path.endswith(".py")}),
    }
    command = ("python3", "repository.py", name, str(task.settings.importers))
    outcome = await task.run("parse", program, command)
    if not outcome.ok:
        raise Dropped("the repository cannot be parsed", f"{outcome.kind}: {outcome.stderr[-300:]}")
    found = json.loads(outcome.stdout)
    for _ in found["unparsed"]:
        task.count("parse", "a file does not parse")
    if not found["modules"]:
        raise Dropped("no module is imported by enough files")
    modules: dict[str, dict[str, list[str]]] = found["modules"]
    return modules


def _shown(task: Task[Settings], files: dict[str, str], path: str, module: dict[str, list[str]]) -> list[str]:
    """The files of the context: those that import the module, and others at random, up to a random bucket.

    Empty if the importers do not fit any.
    """
    tokens = task.settings.own_tokenizer.encode
    chance = random.Random(f"{task.id} {path}")
    needed = sum(len(tokens(_section(name, files[name]))) for name in module["importers"])
    needed += 2 * len(tokens(files[path])) + _SPARE  # what a model writes may be longer than the file
    fitting = [bucket for bucket in task.settings.buckets if needed <= bucket]
    if not fitting:
        return []
    room = chance.choice(fitting) - needed
    shown = list(module["importers"])
    others = sorted(set(files) - {path, *shown})
    for name in chance.sample(others, len(others)):
        length = len(tokens(_section(name, files[name])))
        if length <= room:
            shown.append(name)
            room -= length
    return sorted(shown)


def _section(path: str, text: str) -> str:
    return f"File `{path}`:\n\n{fenced(text, 'python')}\n\n"


async def _rows(task: Task[Settings], name: str, files: dict[str, str], missing: _Missing) -> list[Row]:
    """The row of the list of files, and that of the code; the first alone if no code passes."""
    context = "".join(_section(path, files[path]) for path in missing.shown)
    asked = Message("user", task.prompt("ask", repository=name, context=context, path=missing.path))
    listed = await _listed(task, asked, missing)
    if listed is None:
        return []
    extra = {"repository": name, "missing": missing.path, "importers": missing.importers}
    rows = [_row(task, [asked, listed], "importers", extra)]
    request = Message("user", task.prompt("write", path=missing.path))
    dialog = [asked, listed, request]
    original = await labels_of(task, "python", files[missing.path])
    tests = OwnTests(task, task.settings.tests, files, missing.path)
    has_tests = bool(task.settings.tests) and await tests.find()
    for seed in range(task.settings.tries):
        reply = await task.ask("write", dialog, seed=seed)
        fault, close = await _judged(task, reply, missing, original, tests if has_tests else None)
        task.count("check", fault or "right")
        if not fault:
            code = {"similarity": round(close, 3), "names": missing.names, "tested": has_tests}
            return [
                *rows,
                _row(task, [*dialog, Message("assistant", reply.text.strip())], "code", extra | code),
            ]
    return rows


async def _listed(task: Task[Settings], asked: Message, missing: _Missing) -> Message | None:
    """The first reply that lists exactly the files that import the module."""
    for seed in range(task.settings.tries):
        reply = await task.ask("ask", [asked], seed=seed)
        try:
            block = block_in(reply, "the list", "text", ("text", "txt", "plaintext"))
        except Dropped as dropped:
            task.count("list", dropped.reason)
            continue
        paths = [line.strip() for line in block.splitlines() if line.strip()]
        is_right = sorted(paths) == missing.importers
        task.count("list", "right" if is_right else "other files than those that import it")
        if is_right:
            return Message("assistant", reply.text.strip())
    return None


async def _judged(
    task: Task[Settings], reply: Reply, missing: _Missing, original: list[str], tests: OwnTests | None
) -> tuple[str, float]:
    """What is wrong with the code in a reply, or nothing; and its similarity to the file."""
    try:
        code = program_in(reply, "python", "the file")
    except Dropped as dropped:
        return dropped.reason, 0.0
    outcome = await parse_python(task, "names", "definitions.py", code)
    if not outcome.ok:
        return "the file does not parse", 0.0
    defined = set(json.loads(outcome.stdout))
    if "*" not in defined and not set(missing.names) <= defined:
        return "the file lacks names that others use", 0.0
    close = similarity(original, await labels_of(task, "python", code))
    if tests is not None:
        return ("" if await tests.pass_with(code) else "the file fails the repository's tests"), close
    return ("" if close >= task.settings.least else "the file is too far from the original"), close


def _row(task: Task[Settings], messages: list[Message], kind: str, extra: dict[str, Any]) -> Row:
    return Row(messages, "long_context", kind=kind, extra=measured(messages, task.settings) | extra)
