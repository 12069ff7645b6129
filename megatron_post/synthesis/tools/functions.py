"""Definitions of functions, and calls that are validated against them and executed, all in the sandbox."""

import json
from dataclasses import dataclass
from typing import Any

from megatron_post.synthesis.programs import Files
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.task import Task
from megatron_post.synthesis.tools.scripts import run_script, script

Tool = dict[str, Any]


@dataclass(frozen=True)
class Called:
    """The calls of one reply. calls: with their real arguments, and outputs if the functions have bodies.

    error: why the last call does not fit its definition or does not run, or nothing.
    """

    calls: tuple[dict[str, Any], ...]
    error: str


async def defined_in(task: Task[Any], source: str) -> list[Tool]:
    """The definitions of the functions in a Python file. The report counts why others are left out.

    Raises `Dropped` if the file cannot be parsed.
    """
    outcome = await run_script(task, "define", "signatures.py", {"functions.py": source})
    if not outcome.ok:
        raise Dropped("the file does not parse", outcome.stderr[-300:] or outcome.kind)
    found = json.loads(outcome.stdout)
    for _ in found["left_out"]:
        task.count("define", "a function has no JSON schema")
    tools: list[Tool] = found["tools"]
    return tools


async def called(task: Task[Any], tools: list[Tool], calls: list[Any], source: str | None) -> Called:
    """Validate and execute calls. Functions with bodies are executed twice. source: the file that has them.

    Raises `Dropped` if the definitions are wrong, if the outputs differ, and if the program exceeds a limit.
    """
    files: Files = {
        "tools.json": json.dumps(tools),
        "calls.json": json.dumps(calls),
        "schemas.py": script("schemas.py"),
    }
    if source is not None:
        files = {**files, "functions.py": source}
    found = []
    for again in (False, True) if source is not None and calls else (False,):
        outcome = await run_script(task, "call", "call_functions.py", files, again=again)
        try:
            result = json.loads(outcome.stdout)
        except (ValueError, RecursionError):
            raise Dropped("the functions do not end as they should", outcome.kind) from None
        if result["definitions"]:
            raise Dropped("the definitions are wrong", result["definitions"][0])
        found.append(result["calls"])
    if any(each != found[0] for each in found):
        raise Dropped("a call has another output when it runs again")
    error = next((call["error"] for call in found[0] if "error" in call), "")
    return Called(tuple(found[0]), error)
