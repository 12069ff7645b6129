"""How far a run is, in the log of a job and on a terminal."""

import asyncio
import io

import pytest
from rich.console import Console

from megatron_post.synthesis import progress
from megatron_post.synthesis.progress import RowProgress, Spent


def _printed(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    """What is printed of a process with ten rows, six of which come from the journal."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 0.01)
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    asked = 0

    async def main() -> None:
        nonlocal asked
        shown = RowProgress(
            console, who="process 1 of 2: ", total=10, spent=lambda: Spent(asked, 50 * asked, 20 * asked)
        )
        async with shown.shown():
            for number in range(10):
                if number >= 6:
                    asked += 2
                    await asyncio.sleep(0.1)
                shown.add(is_dropped=number == 3)

    asyncio.run(main())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _printed(monkeypatch, terminal=False).splitlines()
    assert 4 <= len(lines) <= 10  # 0.4 s, with a line each 0.05 s and one at the end
    assert lines[-1].startswith("process 1 of 2: 10 of 10 rows, 1 dropped or failed, 8 requests asked, ")
    assert lines[-1].endswith(" tokens/s, 400 + 160 tokens spent")
    assert any(line.endswith(" left") for line in lines[:-1])


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _printed(monkeypatch, terminal=True)
    assert "synthesizing" in text and "10/10" in text and "8 requests asked" in text


def test_the_remaining_time_is_of_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rows of a replay take no time. The other four take a second each."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    asked = 0
    shown = RowProgress(Console(), who="", total=10, spent=lambda: Spent(asked, 0, 10 * asked))
    for _ in range(6):
        shown.add(is_dropped=False)
    assert "left" not in shown.text()
    asked = 1
    assert "left" not in shown.text()
    now += 1.0
    shown.add(is_dropped=False)
    assert shown.text().endswith("10 tokens/s, 0 + 10 tokens spent, 0:00:03 left")
