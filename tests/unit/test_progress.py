"""Work shows its rate and the time that is left, as a bar on a terminal and as a line a minute in a log."""

import io
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_post import progress as module
from megatron_post.config.data import Source
from megatron_post.convert import jobs
from megatron_post.convert.to_hf import ToHuggingFace
from megatron_post.convert.to_megatron import ToMegatron
from megatron_post.data.row_files import likely_rows
from megatron_post.display import make_console
from megatron_post.progress import WorkProgress
from tests.unit.rounds.models import tiny_policy


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _shown(seconds: float, *, terminal: bool = False, **options: Any) -> list[str]:
    """What 10 pieces of work print that take `seconds` each."""
    clock, console = Clock(), make_console(width=200)
    console.file = stream = io.StringIO()
    console._force_terminal = terminal
    values: dict[str, Any] = {"total": 1210, "done": 210, "unit": "rows", "console": console, "clock": clock}
    with WorkProgress("scoring x", **(values | options)) as progress:
        for _ in progress.track(range(10)):
            clock.now += seconds
            progress.advance(99)
    return stream.getvalue().splitlines()


def test_a_log_gets_a_line_a_minute() -> None:
    """10 times 100 rows take 25 s each. The lines are at 75 s, 150 s and 225 s.

    The first one is at 210 + 2 x 100 + 99 rows: 299 new rows in 75 s are 3.99 a second, so 701 take 176 s.
    """
    lines = _shown(25.0)
    assert lines[0] == "scoring x: 509 of 1,210 rows, 4.0 rows/s, 0:02:56 left"
    assert [line.split(" of ")[0] for line in lines] == [f"scoring x: {n}" for n in (509, 809, "1,109")]


def test_short_work_prints_nothing_into_a_log() -> None:
    assert _shown(5.0) == []


def test_a_terminal_gets_a_bar() -> None:
    shown = "\n".join(_shown(1.0, terminal=True))
    last = shown[shown.rindex("scoring x") :]
    assert "1,210 of 1,210 rows, 100 rows/s" in last and "left" not in last


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"total": None, "done": 0}, "scoring x: 299 rows, 4.0 rows/s"),
        ({"is_estimate": True}, "scoring x: 509 of about 1,210 rows, 4.0 rows/s, 0:02:56 left"),
        ({"total": 300, "is_estimate": True}, "scoring x: 509 of about 300 rows, 4.0 rows/s"),
        (
            {"detail": lambda: "7 tokens/s", "total": 509},
            "scoring x: 509 of 509 rows, 4.0 rows/s, 7 tokens/s",
        ),
    ],
)
def test_an_unknown_or_exceeded_total_has_no_remaining_time(options: dict[str, Any], expected: str) -> None:
    assert _shown(25.0, **options)[0] == expected


def test_the_rows_of_a_large_file_are_estimated(tmp_path: Path) -> None:
    """Lines of 10 bytes: 300,000 of them are 3 MB, and 1 MiB is read."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 12}\n' * 300_000)
    assert likely_rows(Source(name="x", path=str(path))) == 300_000
    assert likely_rows(Source(name="x", path=str(path), max_rows=7)) == 7
    path.write_bytes(b'{"a": 12}\n' * 3)
    assert likely_rows(Source(name="x", path=str(path))) == 3
    assert likely_rows(Source(name="x", path=str(tmp_path))) is None


def test_a_conversion_shows_the_size_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part waits until a line has been printed. The file then has its header and nothing else."""
    model = tiny_policy(tmp_path / "model")
    source = tmp_path / "run/checkpoints"
    lines: list[str] = []
    jobs.convert(ToMegatron(str(model), str(source)), workers=1, report=lines.append)
    stream, printed = io.StringIO(), threading.Event()

    class Noticed(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*objects, **options)
            printed.set()

    monkeypatch.setattr(jobs, "make_console", lambda: Noticed(file=stream, width=200))
    monkeypatch.setattr(jobs, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    write_part = ToHuggingFace.write_part

    def slow(self: ToHuggingFace, number: int, file: Any) -> dict[str, Any]:
        assert printed.wait(60)
        return write_part(self, number, file)

    monkeypatch.setattr(ToHuggingFace, "write_part", slow)
    jobs.convert(ToHuggingFace(str(source), str(tmp_path / "back")), workers=1, report=lines.append)
    assert stream.getvalue().splitlines()[0] == "writing back: 0.0 of 0.4 MB"
