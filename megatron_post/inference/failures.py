"""Counts and limits the prompts without an answer, and writes them to a file next to the output."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_post.storage.files import read_lines, write_lines


class TooManyFailures(ValueError):
    """More prompts failed than `max_failed` allows. The message has the first reason."""


def failures_of(output: Path) -> Path:
    """The path of an output's failures. The file does not exist if nothing failed."""
    return output.with_name(f"{output.name}.failures.jsonl")


def read_failures(output: Path) -> list[dict[str, Any]]:
    """A row with prompt, sample, checkpoint and reason for each response that failed."""
    path = failures_of(output)
    return list(read_lines(path)) if path.is_file() else []


def write_failures(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the file, or remove an earlier one if nothing failed."""
    path = failures_of(output)
    if rows:
        write_lines(path, rows)
    else:
        path.unlink(missing_ok=True)


def failed_prompts(rows: Sequence[dict[str, Any]]) -> int:
    """The number of different prompts among the failures."""
    return len({row["prompt"] for row in rows})


def check_failures(rows: Sequence[dict[str, Any]], *, prompts: int, max_failed: float) -> None:
    """Raise `TooManyFailures` if all prompts failed, or more than the share `max_failed`, rounded up."""
    allowed = min(math.ceil(max_failed * prompts - 1e-9), prompts - 1)
    if (failed := failed_prompts(rows)) > allowed:
        raise TooManyFailures(
            f"{failed} of {prompts} prompts failed, and max_failed={max_failed} allows {allowed}. The first "
            f"was prompt {rows[0]['prompt']}: {rows[0]['reason']}. What was finished before is kept: mend "
            "what answers, or raise max_failed, and run the same command again"
        )
