"""A recipe whose next input rows follow from what its last ones have found."""

import asyncio
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from megatron_post.synthesis.recipe import load_recipe
from megatron_post.synthesis.report import write_report_of
from megatron_post.synthesis.run import TooManyFailures, synthesize
from megatron_post.synthesis.settings import load_synthesis
from tests.unit.synthesis.conftest import Place

RECIPE = '''"""Halves of numbers, until they are one."""

from megatron_post.data.dialog import Message
from megatron_post.synthesis.row import Found, Row

VERSION = 1


def generations(seeds, settings):
    found = yield [{"number": int(seed["expected"])} for seed in seeds]
    while found:
        found = yield found


async def recipe(row, task):
    number = row["number"]
    reply = await task.ask("halve", f"Halve {number}")
    task.measure("number", number)
    made = [Row([Message("user", f"Halve {number}"), reply.message], "math")] if number % 2 else []
    return [*made, *([Found({"number": number // 2})] if number > 1 else [])]
'''


def _write(place: Place, *, old: str = "", new: str = "") -> str:
    path = place.directory / "halving.py"
    assert old in RECIPE
    path.write_text(RECIPE.replace(old, new) if old else RECIPE)
    return str(path)


def test_the_rows_of_all_generations_come_in_order(place: Place) -> None:
    place.add_tasks("right", "right", "right", first=5)  # 5, 6, 7 -> 2, 3, 3 -> 1, 1, 1
    printed = place.run(recipe=_write(place))
    assert "7 rows from 9 of 9 input rows" in printed
    sources = [row["provenance"]["source"].removeprefix("generation ") for row in place.rows()]
    assert sources == ["1:1", "1:3", "2:2", "2:3", "3:1", "3:2", "3:3"]
    page = (place.output / "report.html").read_text()
    assert "9 value(s), mean 3.222" in page and "not finished" not in page


def test_a_run_with_more_processes_than_rows(place: Place) -> None:
    place.add_tasks("right", "right", first=5)
    recipe = _write(place)
    place.run(recipe=recipe)
    other = str(place.directory / "other")

    async def all_at_once() -> None:
        await asyncio.gather(*(asyncio.to_thread(_run_rank, place, recipe, rank, other) for rank in range(4)))

    asyncio.run(all_at_once())
    assert {name: (Path(other) / name).read_bytes() for name in place.bytes()} == place.bytes()


def _run_rank(place: Place, recipe: str, rank: int, output: str) -> None:
    settings = load_synthesis(str(place.directory / "run.yaml"), [f"output={output}"])
    synthesize(settings, rank=rank, size=4, console=Console(file=StringIO()))


def test_the_report_of_a_run_that_waits_for_its_other_process(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def leave(*_: object) -> None:
        raise KeyboardInterrupt

    place.add_tasks("right", "right", first=5)
    monkeypatch.setattr("megatron_post.synthesis.run._wait_for_others", leave)
    with pytest.raises(KeyboardInterrupt):
        place.run(recipe=_write(place), size=2)
    page = write_report_of(place.output).read_text()
    assert "This run is not finished. 1 input rows are done, and more generations may follow." in page


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def generations(seeds, settings)", "def generations(seeds)", "a generator with two arguments"),
        ("def generations", "async def generations", "a generator with two arguments"),
        ("    while found:\n        found = yield found\n", "    raise OSError\n", ""),
    ],
)
def test_what_generations_must_be(place: Place, old: str, new: str, message: str) -> None:
    path = _write(place, old=old, new=new)
    if message:
        with pytest.raises(ValueError, match=message):
            load_recipe(path)
    else:
        place.add_tasks("right", first=5)
        with pytest.raises(OSError):
            place.run(recipe=path)


def test_a_first_generation_without_rows_is_an_error(place: Place) -> None:
    place.add_tasks("right")
    with pytest.raises(ValueError, match="its first generation has no rows"):
        place.run(recipe=_write(place, old="for seed in seeds]", new="for seed in seeds[:0]]"))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "def generations",
            "def unused",
            "a recipe returns a list of `Row`, `PreferenceRow` or `StepLabels`, and not of Found",
        ),
        ("number // 2})", "number // 2, 'other': {1}})", "a value of the row is not JSON"),
        ('task.measure("number", number)', 'task.measure("number", float("nan"))', "and not as nan"),
    ],
)
def test_what_is_found_and_measured_is_checked(place: Place, old: str, new: str, reason: str) -> None:
    place.add_tasks("right", first=4)
    recipe = _write(place, old=old, new=new)
    if old == "def generations":
        recipe = _write(place, old='number = row["number"]', new='number = int(row["expected"])')
        Path(recipe).write_text(Path(recipe).read_text().replace(old, new))
    try:
        place.run(recipe=recipe, max_failed=1.0)
        (dropped,) = place.rows("dropped.jsonl")
        text = dropped["reason"] + dropped["detail"]
    except TooManyFailures as error:
        text = str(error)
    assert reason in text
