"""Finds and runs the scripts of this package that run inside the sandbox."""

from pathlib import Path
from typing import Any

from megatron_post.sandbox.outcome import Outcome
from megatron_post.synthesis.code import inside
from megatron_post.synthesis.programs import Files
from megatron_post.synthesis.task import Task


def script(name: str) -> Path:
    """The path of a script, for the files of a program. The journal only keeps its checksum."""
    return Path(inside.__file__).with_name(name)


async def parse_python(task: Task[Any], step: str, name: str, source: str, *arguments: str) -> Outcome:
    """Run a script that parses a Python program, which is the file main.py.

    Python's parser can crash on hostile text. In the sandbox a crash is only an outcome.
    """
    files: Files = {name: script(name), "main.py": source}
    return await task.run(step, files, ("python3", name, *arguments))
