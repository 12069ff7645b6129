"""Prompts that got no answer: counted and bounded while samples are drawn, and written beside the output."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_post.storage.files import read_lines, write_lines


class TooManyFailures(ValueError):
    """More prompts failed than `max_failed` allows; the message has the first reason."""


def failures_of(output: Path) -> Path:
    """Where the failures of an output are. There is no such file where nothing failed."""
    return output.with_name(f"{output.name}.failures.jsonl")


def read_failures(output: Path) -> list[dict[str, Any]]:
    """A row for each response that could not be had: its prompt, sample, checkpoint, and the reason."""
    path = failures_of(output)
    return list(read_lines(path)) if path.is_file() else []


def write_failures(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the file, or remove an earlier one where nothing failed."""
    path = failures_of(output)
    if rows:
        write_lines(path, rows)
    else:
        path.unlink(missing_ok=True)


def failed_prompts(rows: Sequence[dict[str, Any]]) -> int:
    """How many prompts these failures are of."""
    return len({row["prompt"] for row in rows})


def check_failures(rows: Sequence[dict[str, Any]], *, prompts: int, max_failed: float) -> None:
    """Raises `TooManyFailures` where more than this share of all prompts failed, rounded up, or every one."""
    allowed = min(math.ceil(max_failed * prompts - 1e-9), prompts - 1)
    if (failed := failed_prompts(rows)) > allowed:
        raise TooManyFailures(
            f"{failed} of {prompts} prompts failed, and max_failed={max_failed} allows {allowed}. The first "
            f"was prompt {rows[0]['prompt']}: {rows[0]['reason']}. What was finished before is kept: mend "
            "what answers, or raise max_failed, and run the same command again"
        )
