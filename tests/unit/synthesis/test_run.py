"""A run over a real server: what is kept, dropped and failed, and what is asked when it starts again."""

import pytest

from megatron_post.parallel.environment import share_of
from megatron_post.synthesis.run import TooManyFailures
from tests.unit.synthesis.conftest import Place

MANNERS = ("right", "mended", "wrong", "prose", "broken", "marked", "right")


def test_exactly_the_right_rows_come_out(place: Place) -> None:
    place.add_tasks(*MANNERS)
    printed = place.run()
    assert "3 rows from 3 of 7 input rows, 4 dropped, 0 failed" in printed
    rows, dropped = place.rows(), place.rows("dropped.jsonl")
    assert [row["kind"] for row in rows] == ["first_try", "correction", "first_try"]
    assert [row["provenance"]["source"].rpartition(":")[2] for row in rows] == ["1", "2", "7"]
    assert [(row["step"], row["reason"][:30]) for row in dropped] == [
        ("check", "the last program does not prin"),
        ("solve", "the reply has no program"),
        ("check", "the last program does not prin"),
        ("check", "`data pack` would refuse the r"),
    ]
    assert [message["role"] for message in rows[1]["messages"]] == ["user", "assistant"] * 2
    assert [m.get("train") for m in rows[1]["messages"]] == [None, False, None, True]
    journal = rows[1]["provenance"]["journal"]
    assert [(e["step"], e["result"]) for e in journal] == [
        ("solve", "reply"),
        ("check", "passed"),
        ("correct", "reply"),
        ("check", "passed"),
    ]
    assert rows[1]["provenance"]["models"] == {"author": "author"} and all(e["key"] for e in journal)
    assert place.asked() == 10


def test_a_finished_run_says_so_and_asks_nothing(place: Place) -> None:
    place.add_tasks("right", "wrong")
    place.run()
    before, _ = place.bytes(), place.asked()
    assert "is finished: 1 rows from 1 of 2 input rows, 1 dropped, 0 failed. Nothing was asked" in place.run()
    assert place.asked() == 0 and place.bytes() == before


def test_rows_that_are_added_are_asked_alone(place: Place) -> None:
    place.add_tasks("right", "mended")
    place.run()
    assert place.asked() == 3
    place.add_tasks("right", "wrong", first=2)
    printed = place.run()
    assert "settings that changed since the last start:" in printed and "input.rows: 2 -> 4" in printed
    assert place.asked() == 3 and len(place.rows()) == 3


def test_a_step_that_is_added_is_asked_alone(place: Place) -> None:
    place.add_tasks("right", "mended", "wrong")
    place.run()
    assert place.asked() == 5
    recipe = place.directory / "my_recipe.py"
    text, behind = recipe.read_text(), "        dialog.append(reply.message)\n"
    recipe.write_text(
        text.replace(behind, f'{behind}        await task.ask("rate", "Rate " + row["task"])\n')
    )
    assert "recipe.files.my_recipe.py" in place.run()
    assert place.asked() == 3  # once for each row: the second try rates by an equal request


@pytest.mark.parametrize(
    ("file", "old", "new", "asked"),
    [
        ("my_recipe.py", "VERSION = 1", "VERSION = 2", 5),
        ("my_recipe/correct.j2", "version 1", "version 2", 2),
        ("my_recipe/solve.j2", "version 1", "version 2", 3),
    ],
)
def test_a_higher_version_asks_again(place: Place, file: str, old: str, new: str, asked: int) -> None:
    place.add_tasks("right", "mended", "wrong")
    place.run()
    before, _ = place.rows(), place.asked()
    path = place.directory / file
    path.write_text(path.read_text().replace(old, new))
    place.run()
    assert place.asked() == asked
    assert [row["messages"] for row in place.rows()] == [row["messages"] for row in before]


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(place: Place, size: int) -> None:
    place.add_tasks(*MANNERS)
    place.run()
    expected, asked = place.bytes(), place.asked()
    (place.output / "rows.jsonl").unlink()
    other = str(place.directory / "other")
    for rank in reversed(range(size)):
        printed = place.run(rank=rank, size=size, output=other)
    assert "3 rows from 3 of 7 input rows" in printed and place.asked() == asked
    assert {name: (place.directory / "other" / name).read_bytes() for name in expected} == expected
    place.run(rank=0, size=5, output=other, max_failed=0.5)  # another number goes on with what is there
    assert place.asked() == 0


def test_a_fault_of_the_recipe_costs_its_row(place: Place) -> None:
    place.add_tasks("right", "right")
    with (place.directory / "tasks.jsonl").open("a") as file:
        file.write('{"task": "print 5, and be right"}\n')
    with pytest.raises(TooManyFailures, match=r"2 of 3 input rows failed(.|\n)*KeyError") as error:
        place.run(max_failed=0.3, settings={"tries": 1}, recipe=_faulty(place))
    assert "max_failed=0.3 allows 1" in str(error.value)
    printed = place.run(max_failed=0.7, settings={"tries": 1}, recipe=_faulty(place))
    assert "1 rows from 1 of 3 input rows, 0 dropped, 2 failed" in printed
    assert place.asked() == 3  # nothing was asked again for the second start
    first, second = place.rows("dropped.jsonl")
    assert first["reason"] == "ZeroDivisionError in the recipe" and first["failed"]
    assert second["reason"] == "KeyError in the recipe" and "my_recipe.py:" in second["detail"]


@pytest.mark.parametrize("name", ["write_lines", "write_report", "write_summary"])
def test_a_kill_while_the_rows_are_put_together(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place.add_tasks(*MANNERS)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(f"megatron_post.synthesis.run.{name}", interrupt)
        place.run()
    asked = place.asked()
    place.run()
    killed = place.bytes()
    assert place.asked() == 0 and not (place.output / ".parts").exists()
    place.run(output=str(place.directory / "other"))
    assert place.asked() == asked
    assert {each: (place.directory / "other" / each).read_bytes() for each in killed} == killed


def test_a_run_in_which_every_row_fails_is_an_error(place: Place) -> None:
    place.add_tasks("right")
    with pytest.raises(TooManyFailures, match=r"1 of 1 input rows failed, and max_failed=0\.9 allows 0"):
        place.run(max_failed=0.9, recipe=_faulty(place))
    assert "0 rows from 0 of 1 input rows, 0 dropped, 1 failed" in place.run(
        max_failed=1.0, recipe=_faulty(place)
    )


def _faulty(place: Place) -> str:
    path = place.directory / "my_recipe.py"
    fault = "        1 / (not task.source.endswith(':1'))\n"
    if fault not in (text := path.read_text()):
        path.write_text(text.replace("        outcome = await", f"{fault}        outcome = await"))
    return str(path)


def test_the_share_of_an_array() -> None:
    assert share_of(None, None, {}) == (0, 1)
    assert share_of(1, 3, {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2"}) == (1, 3)
    array = {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "4"}
    assert share_of(None, None, array) == (2, 4)
    for rank, size, environment in (
        (1, None, {}),
        (3, 3, {}),
        (None, None, {**array, "SLURM_ARRAY_TASK_ID": "8"}),
    ):
        with pytest.raises(ValueError, match="size"):
            share_of(rank, size, environment)
