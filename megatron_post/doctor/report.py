"""`megatron-post doctor` reports installed versions, the fused parts that run, and the cost of missing ones.

It must work on a machine where something is broken. So it reads versions without importing packages, and it
reports a probe that fails instead of raising its error.
"""

from collections.abc import Iterable

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_post.display import printable
from megatron_post.doctor.fused_parts import fused_parts
from megatron_post.doctor.machine import machine, versions
from megatron_post.doctor.probes import value_or
from megatron_post.doctor.problems import find_problems, import_failure


def diagnose(console: Console) -> None:
    """Print everything. Never raises."""
    has_gpu = value_or(False, _has_gpu)
    _print(console, "versions", versions())
    _print(console, "machine", machine())
    table = Table("fused part", "state", "what it means here", box=SIMPLE)
    colours = {"active": "green", "missing": "yellow", "not needed": "dim"}
    parts = fused_parts(has_gpu=has_gpu, core_loads=import_failure() is None)
    for part in parts:
        table.add_row(part.name, Text(part.state, style=colours[part.state]), part.meaning)
    console.print(table)
    # Each command is on a line of its own that is not wrapped, so that users can copy it.
    for part in parts:
        if part.remedy:
            console.print(f"to add {part.name}: {part.remedy}", highlight=False, soft_wrap=True)
    problems = list(find_problems())
    for problem in problems:
        text = Text.assemble(("problem: ", "red"), printable(problem))
        console.print(text, highlight=False, soft_wrap=True)
    if not problems:
        console.print("no problems found", highlight=False)


def _print(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table(title, "", box=SIMPLE)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
