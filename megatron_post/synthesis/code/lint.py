"""ruff on Python that a model wrote. ruff reads the text and runs nothing of it."""

import asyncio
import subprocess

from megatron_post.installation import install_command
from megatron_post.synthesis.code.unit_tests import Report

_RULES = "E4,E7,E9,F,B"  # ruff's own choice, and likely bugs
_SYNTAX = ": invalid-syntax: "
_SECONDS = 60.0
_KEPT = 2000  # characters of what it finds


async def lint(source: str) -> Report | None:
    """What ruff finds: a report of the kind "lint", or "build" for what does not parse; None for nothing.

    Comments in the text cannot silence it.

    Raises `ValueError` where ruff is not installed, and `RuntimeError` where it fails on the text.
    """
    done = await asyncio.to_thread(_ruff, source)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"ruff failed with exit status {done.returncode}: {done.stderr.strip()[-300:]}")
    if not done.stdout.strip():
        return None
    return Report(kind="build" if _SYNTAX in done.stdout else "lint", message=done.stdout.strip()[:_KEPT])


def _ruff(source: str) -> subprocess.CompletedProcess[str]:
    try:
        from ruff import find_ruff_bin

        command = [find_ruff_bin(), "check", "--isolated", "--no-cache", "--ignore-noqa", "--quiet"]
    except (ImportError, FileNotFoundError):
        raise ValueError(
            f"ruff, which checks Python programs, is not installed; {install_command('synthesize')}"
        ) from None
    command += ["--select", _RULES, "--output-format", "concise", "--stdin-filename", "main.py", "-"]
    return subprocess.run(
        command, input=source, capture_output=True, encoding="utf-8", errors="replace", timeout=_SECONDS
    )
