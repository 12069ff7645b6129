"""The closest of several programs that were written from an explanation is kept, if it is close enough."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megatron_post.sandbox.outcome import Outcome
from megatron_post.sandbox.sandbox import open_sandbox
from megatron_post.sandbox.settings import Bubblewrap
from megatron_post.synthesis.code.similarity import labels_of, similarity
from megatron_post.synthesis.recipes.back_translation import _quotes
from megatron_post.synthesis.task import Files
from tests.scripted_server import ScriptedServer
from tests.unit.synthesis.code.running import check_that_it_goes_on, needs_bubblewrap, outcomes, run
from tests.unit.synthesis.code.translators import SAME, back, source
from tests.unit.synthesis.conftest import Place

pytestmark = needs_bubblewrap
SETTINGS = {"samples": 3, "seconds": 4.0}
ROWS = "explanation, program"
# manner -> outcome, which sample is kept, and by what it was compared
EXPECTED = {
    "tested": (ROWS, 1, "tests"),
    "only_far_passes": (ROWS, 1, "tests"),
    "none_passes": ("nothing that was written passes the tests of the code", 0, ""),
    "tests_of_nothing": (ROWS, 1, "syntax tree"),
    "tests_wrong": (ROWS, 1, "syntax tree"),
    "no_tests": (ROWS, 2, "syntax tree"),
    "no_tests_and_close": (ROWS, 1, "syntax tree"),
    "no_tests_and_far": ("nothing that was written is close enough to the code", 0, ""),
    "no_programs": ("nothing that was written is close enough to the code", 0, ""),
    "quotes": ("the explanation quotes the code", 0, ""),
    "quotes_lines": ("the explanation quotes the code", 0, ""),
    "declines_to_explain": ("the explanation is empty", 0, ""),
    "source_broken": ("the code does not compile", 0, ""),
    "source_deep": ("the code does not compile", 0, ""),
}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ScriptedServer(back) as server:
        yield Place(tmp_path, server)


def _sources(*manners: str) -> list[str]:
    found = [source(manner, number) for number, manner in enumerate(manners, start=1)]
    deep = "# manner: source_deep\n" + "(" * 10_000 + ")" * 10_000
    return [deep if "source_deep" in text else text for text in found]


def test_exactly_the_right_rows_come_out(place: Place) -> None:
    run(place, "back_translation", _sources(*EXPECTED), settings=SETTINGS)
    assert outcomes(place) == {n: outcome for n, (outcome, _, _) in enumerate(EXPECTED.values(), start=1)}
    for row in place.rows():
        number = int(row["provenance"]["source"].rpartition("/")[2].partition(":")[0])
        _, kept, compared_by = list(EXPECTED.values())[number - 1]
        assert row["compared_by"] == compared_by and 0 < row["similarity"] <= 1
        question, answer = (message["content"] for message in row["messages"])
        if row["kind"] == "explanation":
            assert "LIMIT" in question and "sums words" in answer
        else:
            assert "LIMIT" not in question and "sums words" in question
            name = back({"messages": [{"content": question}], "seed": kept})
            assert answer == name.strip() or answer == name


def test_a_run_that_was_cut_off_goes_on(place: Place) -> None:
    sources = _sources("tested", "no_tests", "quotes")
    check_that_it_goes_on(place, 0.5, "back_translation", sources, settings=SETTINGS)


def test_short_lines_of_code_are_quoted_too() -> None:
    code = "def f(a, b):\n    c = a + b\n    c *= 2\n    return c\n\n"
    code += "if __name__ == '__main__':\n    print(f(1, 2))\n"
    said = "It doubles a sum. `def f(a, b):` takes two numbers.\n\n    c = a + b\n    c *= 2\n"
    assert not _quotes(said, code)
    assert _quotes(f"The code is {' '.join(code.split())}", code)
    assert _quotes("This is it:\n\n" + "\n".join(f"    {line}" for line in code.split("\n")), code)


class _Task:
    """As much of a task as comparing needs."""

    async def run(self, step: str, files: Files, command: Sequence[str]) -> Outcome:
        content = {name: text.read_text() if isinstance(text, Path) else text for name, text in files.items()}
        with open_sandbox(Bubblewrap()) as sandbox:
            return await sandbox.run(content, command)


def _similarity(language: str, one: str, other: str) -> float:
    both = (asyncio.run(labels_of(_Task(), language, text)) for text in (one, other))  # type: ignore[arg-type]
    return similarity(*both)


def test_names_comments_and_order_hardly_matter() -> None:
    one, other = (
        "def f(a: int) -> int:\n    '''Doc.'''\n    return a + 1\n",
        "def g(b):\n    return b + 1  # next\n",
    )
    assert _similarity("python", one, other) == 1.0
    swapped = _similarity("python", f"{one}\nprint(f(2) * 7)\n{SAME}", f"{SAME}\nprint(g(2) * 7)\n{other}")
    assert 0.8 < swapped < 1
    assert _similarity("python", one, "import os\nfor x in os.listdir('.'):\n    print(x)\n") < 0.2


def test_similarity_is_dice_of_three_labels() -> None:
    """(--a -ab abc bc- c--) and (--a -ab abd bd- d--) have two of five in common."""
    assert similarity(["a", "b", "c"], ["a", "b", "d"]) == pytest.approx(2 * 2 / 10)
    assert similarity([], []) == 1.0


def test_other_languages_are_compared_by_tokens() -> None:
    one, other = "int add(int a) { return a + 1; } // one", "int plus(int b) { /* two */ return b + 1; }"
    assert _similarity("cpp", one, other) == 1.0
    assert _similarity("cpp", one, "int main() { while (true) { print('x'); } }") < 0.4
