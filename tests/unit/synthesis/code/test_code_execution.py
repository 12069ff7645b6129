"""Exactly the right rows come out of problems whose programs and tests are right or wrong in known ways."""

import io
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_post.sandbox.languages import TOOLS, Language
from megatron_post.storage.reading import read_object
from megatron_post.synthesis.run import TooManyFailures
from megatron_post.synthesis.show import show_row
from tests.scripted_server import ScriptedServer
from tests.unit.synthesis.code.author import answer, fault, snippet
from tests.unit.synthesis.code.running import check_that_it_goes_on, needs_bubblewrap, outcomes, run
from tests.unit.synthesis.conftest import Place

# manner of the answers -> how many problems, and what becomes of each: a kind of row, or why it is dropped
EXPECTED = {
    "right": (4, "first_try"),
    "unseen_wrong": (1, "there are no good tests that the correction has not seen"),
    "unseen_empty": (1, "there are no good tests that the correction has not seen"),
    "mended": (3, "correction"),
    "unseen_wrong_first": (1, "correction"),
    "late": (2, "correction"),
    "typo": (1, "correction"),
    "hangs_first": (1, "correction"),
    "unused": (1, "correction"),
    "asserts_nothing_first": (1, "first_try"),
    "asserts_nothing_for_wrong": (1, "correction"),
    "tests_wrong_first": (2, "first_try"),
    "tests_broken_first": (1, "first_try"),
    "stubborn": (1, "the last program fails its tests"),
    "answers": (1, "the correction passes only the tests that it has seen"),
    "exits": (1, "the last program fails its tests"),
    "deletes": (1, "the last program fails its tests"),
    "reads": (1, "the last program fails its tests"),
    "searches": (1, "the last program fails its tests"),
    "forges": (1, "the last program fails its tests"),
    "broken": (1, "the last program does not compile"),
    "nested": (1, "the last program does not compile"),
    "hanging": (1, "the last program does not end in time"),
    "flooding": (1, "the last program ends as 'disk'"),
    "kills": (1, "the last program ends as 'killed'"),
    "silenced": (1, "the linter finds faults in the last program"),
    "asserts_nothing": (1, "wrong programs pass the tests"),
    "asserts_little": (1, "wrong programs pass the tests"),
    "tests_wrong": (2, "every program fails the tests"),
    "all_wrong": (1, "every program fails the tests"),
    "tests_broken": (1, "the tests cannot be loaded"),
    "tests_missing": (1, "the tests cannot be loaded"),
    "tests_forge": (1, "wrong programs pass the tests"),
    "tests_garble": (1, "every program fails the tests"),
    "tests_cheat": (1, "every program fails the tests"),
    "no_problem": (1, "the problem is not in the form that was asked for"),
    "declines": (1, "the program is missing"),
    "declines_tests": (1, "the file of tests is missing"),
    "other_language": (1, "the program is missing"),
    "two_blocks": (1, "the program is ambiguous"),
    "open_block": (1, "the program is cut off"),
    "refused": (1, "refused by a model"),
}


pytestmark = needs_bubblewrap
SETTINGS = {"seconds": 4.0, "mutants": 3}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ScriptedServer(answer, fault) as server:
        yield Place(tmp_path, server)


def _snippets(*manners: str) -> list[str]:
    return [snippet(number, manner) for number, manner in enumerate(manners, start=1)]


@pytest.mark.slow
def test_fifty_problems(place: Place) -> None:
    manners = [manner for manner, (count, _) in EXPECTED.items() for _ in range(count)]
    assert len(manners) == 50
    run(place, "code_execution", _snippets(*manners), settings=SETTINGS)
    assert outcomes(place) == {n: EXPECTED[manner][1] for n, manner in enumerate(manners, start=1)}
    summary = read_object(place.output / "summary.json", "a summary")["summary"]
    counted = Counter({kind.removeprefix("code / "): count for kind, count in summary["kinds"].items()})
    for each in summary["reasons"]:
        counted[each["reason"]] += each["rows"]
    assert counted == Counter(EXPECTED[manner][1] for manner in manners)
    blamed = summary["steps"]["blame"]["results"]
    assert blamed["the tests cannot be loaded"] == 1 + 2 + 2  # one is corrected, and two fail twice each
    assert blamed["wrong programs pass the tests"] == 1 + 1 + 2 + 2 + 2 + 2
    # unused and silenced; late, typo and broken do not parse. Those that stay wrong are written three times
    assert summary["steps"]["lint"]["results"]["failed"] == 1 + 3 + 2 + 1 + 3
    assert (summary["kept"], summary["dropped"], summary["failed"]) == (18, 31, 1)
    for row in place.rows():
        _check(row)


OUTCOMES = {
    "right": "first_try",
    "mended": "correction",
    "typo": "correction",
    "asserts_little": "wrong programs pass the tests",
    "broken": "the last program does not compile",
}


@pytest.mark.parametrize("language", ["cpp", "java", "rust", "javascript", "bash"])
def test_other_languages(place: Place, language: Language) -> None:
    if missing := [tool for tool in TOOLS[language] if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    settings = {"languages": [language], "seconds": 10.0, "mutants": 3, "tries": 2, "witnesses": 1}
    sandbox = {"kind": "bubblewrap", "limits": {"cpu_seconds": 60.0, "seconds": 90.0}}
    run(place, "code_execution", _snippets(*OUTCOMES), settings=settings, sandbox=sandbox)
    assert outcomes(place) == dict(enumerate(OUTCOMES.values(), start=1))
    assert {row["language"] for row in place.rows()} == {language}


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_run_that_was_cut_off_goes_on(place: Place, share: float) -> None:
    snippets = _snippets("mended", "asserts_nothing_first", "tests_wrong_first", "stubborn")
    check_that_it_goes_on(place, share, "code_execution", snippets, settings=SETTINGS)


@pytest.mark.parametrize(
    ("manner", "outcome"),
    [
        ("right", "first_try"),
        ("judged", "the judge finds a fault"),
        ("judged_vaguely", "the verdict is not in the form that was asked for"),
    ],
)
def test_a_judge_may_be_asked(place: Place, manner: str, outcome: str) -> None:
    run(place, "code_execution", _snippets(manner), settings={"judge": True})
    assert outcomes(place) == {1: outcome}


def test_the_journal_keeps_the_checksum_of_a_script(place: Place) -> None:
    run(place, "code_execution", _snippets("right"), settings=SETTINGS)
    (journal,) = (place.output / "journal").glob("journal-*.jsonl")
    text = journal.read_text()
    assert '"run_tests.py":{"script":"run_tests.py","sha256":"' in text and "def main" not in text
    assert '"ruff":{"script":"ruff","sha256":"' in text and len(text) < 50_000
    console = Console(file=io.StringIO(), width=200, markup=False)
    show_row(place.output / "rows.jsonl", 1, console=console)
    assert isinstance(console.file, io.StringIO)
    assert "[run_tests.py]\n(a script of the recipe)\n" in console.file.getvalue()


def test_a_language_that_the_sandbox_lacks_ends_the_run(place: Place) -> None:
    sandbox = {"kind": "bubblewrap", "environment": {"PATH": "/usr/bin"}}
    with pytest.raises(TooManyFailures, match="the sandbox cannot run rust: it needs rustc, cc there"):
        run(
            place,
            "code_execution",
            _snippets("right"),
            settings={"languages": ["rust"]},
            sandbox=sandbox,
            max_failed=0.0,
        )


def _check(row: dict[str, Any]) -> None:
    """A row's last program is right, and is all that is trained."""
    messages = row["messages"]
    assert "+ OFFSET" in messages[-1]["content"] and "import os" not in messages[-1]["content"]
    assert row["capability"] == "code" and row["language"] == "python" and row["topic"].startswith("sums of")
    assert "def test_negative" in row["tests"]
    assert [message["train"] for message in messages if message["role"] == "assistant"] == [
        *[False] * (len(messages) // 2 - 1),
        True,
    ]
    assert (row["kind"] == "first_try") == (len(messages) == 2)
    assert all(message["role"] != "system" for message in messages)
