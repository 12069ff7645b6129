"""The transcript of a row, and the report of a run, finished or not."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from megatron_post.synthesis.report import write_report_of
from megatron_post.synthesis.show import show_row
from tests.unit.synthesis.conftest import Place


def _shown(path: Path, number: int) -> str:
    console = Console(file=io.StringIO(), width=200, markup=False)
    show_row(path, number, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_transcript_has_every_request_and_program(place: Place) -> None:
    place.add_tasks("right", "mended", "wrong")
    place.run()
    text = _shown(place.output / "rows.jsonl", 2)
    parts = [
        *("tasks.jsonl:2", "1. solve: author is asked: reply", "print 1, and be mended", "print(2)"),
        *("2. check: a program: passed", "[main.py]", "print(2)", "[stdout]", "2", "(passed, exit status 0)"),
        *("3. correct: author is asked: reply", "(the first 2 message(s) as above)", "It printed:"),
        *("4. check: a program: passed", "[stdout]", "1", "the row; what is trained is marked"),
        *("[assistant]", "print(2)", "[assistant, trained]", "print(1)"),
    ]
    place_of = 0
    for part in parts:
        place_of = text.find(part, place_of) + len(part)
        assert place_of >= len(part), part
    dropped = _shown(place.output / "dropped.jsonl", 1)
    assert "dropped at check: the last program does not print what is expected" in dropped
    with pytest.raises(ValueError, match=r"--row 3: .* has fewer rows"):
        show_row(place.output / "rows.jsonl", 3, console=Console(file=io.StringIO()))


def test_a_journal_that_is_gone_is_named(place: Place) -> None:
    place.add_tasks("right")
    place.run()
    for file in (place.output / "journal").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*journal has no entry [0-9a-f]{32}"):
        show_row(place.output / "rows.jsonl", 1, console=Console(file=io.StringIO()))


class _Texts(HTMLParser):
    """The texts of a page, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts, self.tags = "", list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts += f" {data.strip()}" if data.strip() else ""


def test_the_report_counts_by_step_and_reason(place: Place) -> None:
    place.add_tasks("right", "mended", "wrong", "prose", "right <script>alert(1)</script>")
    with (place.directory / "tasks.jsonl").open("a") as file:
        file.write("no row\n")
    with pytest.raises(ValueError, match="1 bad row"):
        place.run()
    place.run(max_bad_rows=1, max_failed=1.0)
    page = (place.output / "report.html").read_text()
    found = _Texts(page)
    assert "3 rows made 60.0% of 5 input rows kept" in found.texts
    assert "step rows requests tokens dropped failed solve 5 5" in found.texts
    assert "check results: 6 passed 4 0 0 1 0" in found.texts and "code / correction 1" in found.texts
    assert "1 dropped at solve: the reply has no program" in found.texts
    assert "1 bad row(s) of the input are left out:" in found.texts
    assert (
        "script" not in found.tags and "link" not in found.tags and not re.search(r"(src|href)=.[^#]", page)
    )
    before = page
    (place.output / "report.html").unlink()
    assert write_report_of(place.output).read_text() == before


def test_the_report_of_a_run_that_goes_on(place: Place) -> None:
    place.add_tasks("right", "wrong", "right")
    place.run(rank=1, size=2)
    found = _Texts(write_report_of(place.output).read_text())
    assert "This run is not finished. 1 of 3 input rows are done." in found.texts
    with pytest.raises(ValueError, match=r"run\.json"):
        write_report_of(place.directory)
