"""A translation is kept if it prints the same as its source for every input, and nothing else is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_post.synthesis.code.programs import TITLES
from megatron_post.synthesis.recipes.code_translation import Settings, _runs_source
from tests.scripted_server import ScriptedServer
from tests.unit.synthesis.code.running import check_that_it_goes_on, needs_bubblewrap, outcomes, run
from tests.unit.synthesis.code.translators import source, translate
from tests.unit.synthesis.conftest import Place

pytestmark = needs_bubblewrap
SETTINGS = {"targets": ["bash"], "seconds": 4.0}
EXPECTED = {
    "right": "translation",
    "blanks": "translation",
    "off_by_one": "the outputs differ",
    "guesses": "the outputs differ",
    "fails": "the outputs differ",
    "broken": "the translation does not compile",
    "hangs": "the translation ends as 'hang'",
    "exits": "the translation ends as 'killed'",
    "runs_python": "the translation runs the language of the source",
    "declines": "the translation is missing",
    "source_broken": "the source program does not compile",
    "source_constant": "the source program answers every input alike",
    "source_random": "the source program answers the same input differently",
    "source_fails": "the source program answers too few inputs",
    "source_hangs": "the source program answers too few inputs",
    "no_cases": "the list of inputs is missing",
    "cases_broken": "the list of inputs is not JSON",
    "cases_deep": "the list of inputs is not JSON",
    "cases_of_numbers": "the list of inputs is not a list of texts",
    "few_cases": "the source program answers too few inputs",
}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ScriptedServer(translate) as server:
        yield Place(tmp_path, server)


def _sources(*manners: str) -> list[str]:
    return [source(manner, number) for number, manner in enumerate(manners, start=1)]


def test_exactly_the_right_translations_come_out(place: Place) -> None:
    run(place, "code_translation", _sources(*EXPECTED), settings=SETTINGS)
    assert outcomes(place) == dict(enumerate(EXPECTED.values(), start=1))
    for number, row in enumerate(place.rows(), start=1):
        question, answer = row["messages"]
        assert source(list(EXPECTED)[number - 1], number).rstrip() in question["content"]
        assert answer["train"] and answer["content"].startswith("```bash\n# Sums")
        assert (row["language"], row["source_language"]) == ("bash", "python")
        assert row["cases"] == [
            "",
            "1 2\n",
            f"{number}",
            f"{number} 1\n-1",
            "-5 -6\n",
        ]  # and not "x", which fails


def test_a_run_that_was_cut_off_goes_on(place: Place) -> None:
    sources = _sources("right", "off_by_one", "source_constant")
    check_that_it_goes_on(place, 0.5, "code_translation", sources, settings=SETTINGS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"targets": ("python", "rust")}, "python is the language of the source"),
        ({"cases": 3}, "least_cases=4 is more than cases=3"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**values)


@pytest.mark.parametrize(
    ("target", "program", "expected"),
    [
        ("rust", 'Command::new("python3").arg("-c")', True),
        ("rust", 'Command::new("/usr/bin/python3.11")', True),
        ("rust", 'Command::new("sh").arg("-c").arg("python3 -c 1")', True),
        ("rust", 'let python = "a python_like name"; // python3', False),
        ("bash", "python3 - <<EOF", True),
        ("bash", 'result=$(python -c "print(1)")', True),
        ("bash", "# as in python\npythonic=1", False),
    ],
)
def test_a_translation_that_runs_its_source_is_found(target: Any, program: str, expected: bool) -> None:
    assert target in TITLES and _runs_source(program, target, "python") == expected
