"""Runs ruff inside the sandbox on Python that a model wrote."""

from pathlib import Path
from typing import Any

from megatron_post.installation import install_command
from megatron_post.synthesis.code.unit_tests import Report
from megatron_post.synthesis.task import Files, Task

_RULES = "E4,E7,E9,F,B"  # ruff's default rules, and those for likely bugs
_SYNTAX = ": invalid-syntax: "
_KEPT = 2000  # characters of ruff's output
_COMMAND = (
    "chmod +x ruff && RAYON_NUM_THREADS=1 exec ./ruff check --isolated --no-cache --ignore-noqa --quiet "
    f"--select {_RULES} --output-format concise main.py"
)


async def lint(task: Task[Any], source: str) -> Report | None:
    """A report of what ruff finds, or None. Its kind is "lint", or "build" if the program does not parse.

    Comments in the program cannot silence ruff. Raises `ValueError` if ruff is not installed, or if it does
    not run in the sandbox.
    """
    files: Files = {"ruff": _ruff(), "main.py": source}
    outcome = await task.run("lint", files, ("sh", "-c", _COMMAND))
    if outcome.ok:
        return None
    if outcome.kind == "unavailable" or (outcome.kind == "failed" and outcome.returncode != 1):
        raise ValueError(f"ruff does not run in the sandbox: {outcome.stderr.strip()[-300:]}")
    found = outcome.stdout.strip() or f"ruff ended as {outcome.kind!r}"
    return Report(kind="build" if _SYNTAX in found else "lint", message=found[:_KEPT])


def _ruff() -> Path:
    try:
        from ruff import find_ruff_bin

        return Path(find_ruff_bin())
    except (ImportError, FileNotFoundError):
        raise ValueError(
            f"ruff, which checks Python programs, is not installed; {install_command('synthesize')}"
        ) from None
