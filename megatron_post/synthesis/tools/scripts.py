"""Runs the scripts of the tools in the sandbox, which need Python packages there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_post.sandbox.outcome import Outcome
from megatron_post.synthesis.programs import Files
from megatron_post.synthesis.task import Task
from megatron_post.synthesis.tools import inside

_MISSING = "ModuleNotFoundError: No module named "


async def run_script(
    task: Task[Any],
    step: str,
    name: str,
    files: Files,
    *,
    arguments: Sequence[str] = (),
    again: bool = False,
) -> Outcome:
    """The outcome of a script of `inside`. again: run it a second time, and not take the first outcome.

    Raises `ValueError` if the sandbox does not have a package that the script imports.
    """
    own: Files = {name: script(name), **files}
    outcome = await task.run(step, own, python(name, *arguments, again=again))
    if outcome.kind == "failed" and _MISSING in outcome.stderr:
        package = outcome.stderr.partition(_MISSING)[2].partition("\n")[0]
        raise ValueError(
            f"sandbox: programs cannot import {package}. `pip install --target DIRECTORY` the packages that "
            "docs/synthesis/tools.md lists, and name DIRECTORY in sandbox.read_only and "
            "sandbox.environment.PYTHONPATH"
        )
    return outcome


def script(name: str) -> Path:
    """A file of `inside`."""
    return Path(inside.__file__).with_name(name)


def python(*arguments: str, again: bool = False) -> tuple[str, ...]:
    """A command of Python in which sets have the same order in each run.

    again: whether it is the second run of the same program. Equal commands are run once.
    """
    return ("env", "PYTHONHASHSEED=0", *(("RUN=2",) if again else ()), "python3", *arguments)
