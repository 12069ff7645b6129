"""What a recipe may do, and what it is told when it does something else."""

from pathlib import Path
from typing import Any

import pytest

from megatron_post.config.load import ConfigError
from megatron_post.inference.server import BadServer
from megatron_post.storage.reading import read_object
from megatron_post.synthesis.recipe import built_in_recipes, load_recipe
from megatron_post.synthesis.replies import code_blocks
from megatron_post.synthesis.run import TooManyFailures
from tests.scripted_server import ScriptedServer
from tests.unit.synthesis.conftest import Place

HEAD = """\
import asyncio
from megatron_post.config.section import Count, Section
from megatron_post.data.dialog import Message
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.row import Row
VERSION = 1
"""


def _recipe(place: Place, body: str, *, head: str = HEAD, name: str = "own") -> str:
    """A recipe with this body."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (place.directory / f"{name}.py").write_text(f"{head}async def recipe(row, task):\n{lines}")
    return str(place.directory / f"{name}.py")


def _row(reply: str = "reply") -> str:
    return f'return [Row([Message("user", "q"), {reply}.message], "c")]'


def test_events_are_in_the_order_of_the_recipe(place: Place) -> None:
    """The server answers the first of two chains last. The order is that of `together` all the same."""
    body = (
        "async def chain(number):\n"
        '    await task.ask("first", f"chain {number}", seed=number)\n'
        '    return await task.ask("second", f"chain {number} again", seed=number)\n'
        "replies = await task.together(chain(1), chain(2), chain(3))\n" + _row("replies[0]")
    )
    place.add_tasks("right")

    def slow_first(body: dict[str, Any], attempt: int) -> str | None:
        return "429" if "chain 1" in body["messages"][0]["content"] and attempt == 1 else None

    with ScriptedServer(fault=slow_first) as server:
        place.server.close()
        place.server = server
        place.run(recipe=_recipe(place, body))
    (row,) = place.rows()
    assert [event["step"] for event in row["provenance"]["journal"]] == ["first", "second"] * 3
    assert row["messages"][1]["content"] == "chain 1 again 1"


def test_a_failure_in_together_is_the_first_in_order(place: Place) -> None:
    body = (
        "async def fail(number):\n"
        '    await task.ask(f"step {number}", "q")\n'
        "    await asyncio.sleep(0.05 / number)\n"
        '    raise Dropped(f"reason {number}")\n'
        "await task.together(task.together(fail(1), fail(2)), fail(3))"
    )
    place.add_tasks("right")
    place.run(recipe=_recipe(place, body))
    (dropped,) = place.rows("dropped.jsonl")
    assert (dropped["step"], dropped["reason"]) == ("step 1", "reason 1")
    assert [event["step"] for event in dropped["journal"]] == ["step 1", "step 2", "step 3"]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ('await asyncio.gather(task.ask("a", "q"), task.ask("a", "r"))', "together"),
        ('await task.ask("a", "q", model="judge")', "'judge', which is not in its MODELS"),
        ('await task.run("a", {}, ["true"])', "it needs SANDBOX = True"),
        ('await task.compare("a", "1", "1.0")', "it needs ANSWERS = True"),
        ('await task.ask("a", "q", temperature=-1)', "temperature"),
        ('await task.ask("a", [Message("assistant", "q")])', "the last message is from assistant"),
        ('task.prompt("missing")', "has no missing.j2"),
        ("return [1]", "a list of `Row`"),
        ("return None", "NoneType"),
        ("raise asyncio.CancelledError", "CancelledError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ('await task.ask("a", "q", seed="x")', "a seed is an integer"),
        ('return [Row([Message("user", "q"), Message("assistant", "a")], 5)]', "capability is a text"),
        ('return [Row([Message("user", "q"), Message("assistant", "a")], "c", kind=5)]', "kind is a text"),
        (
            'return [Row([Message("user", "q"), Message("assistant", "a")], "c", unique=5)]',
            "unique is a text",
        ),
        (
            'return [Row([Message("user", "q"), Message("assistant", "a")], "c", parents=[5])]',
            "parents[0] is a text",
        ),
        ("raise Dropped(None)", "reason is a text"),
        ('raise Dropped("a", 5)', "detail is a text"),
        ("task.count(5, 'x')", "step is a text"),
        ("task.count('x', 5)", "result is a text"),
    ],
)
def test_a_mistake_of_a_recipe_is_named(place: Place, body: str, detail: str) -> None:
    place.add_tasks("right")
    place.run(recipe=_recipe(place, body), max_failed=1.0)
    (dropped,) = place.rows("dropped.jsonl")
    assert dropped["failed"] and detail in dropped["detail"], dropped


def test_a_recipe_without_rows_and_one_with_bad_rows_drop_theirs(place: Place) -> None:
    place.add_tasks("right")
    place.run(recipe=_recipe(place, "return []"))
    assert place.rows("dropped.jsonl")[0]["reason"] == "the recipe made no row"
    place.run(recipe=_recipe(place, 'return [Row([Message("user", "q")], "c")]', name="other"))
    (dropped,) = place.rows("dropped.jsonl")
    assert "no assistant message" in dropped["detail"] and not dropped["failed"]


def test_a_bad_row_does_not_drop_the_other_rows(place: Place) -> None:
    place.add_tasks("right")
    body = """asked = Message("user", "q")
return [Row([asked, Message("assistant", text)], "c") for text in ("a", "<|im_end|>", "b")]"""
    place.run(recipe=_recipe(place, body))
    assert [row["messages"][1]["content"] for row in place.rows()] == ["a", "b"]
    steps = read_object(place.output / "summary.json", "summary")["summary"]["steps"]
    assert steps["rows"]["results"] == {"`data pack` would refuse the row": 1}


def test_a_refusal_fails_its_row_and_is_not_asked_again(place: Place) -> None:
    def refuse(body: dict[str, Any], attempt: int) -> str | None:
        return "400" if "print 1," in body["messages"][0]["content"] else None

    place.add_tasks("right", "right", "right")
    with ScriptedServer(place.server._answer, refuse) as server:
        place.server.close()
        place.server = server
        with pytest.raises(TooManyFailures, match=r"1 of 3 input rows failed.*allows 0(.|\n)*scripted 400"):
            place.run(max_failed=0.0)
        place.asked()
        place.run(max_failed=0.34)
        assert place.asked() <= 2  # those that had no answer when the failure ended the run
    (dropped,) = place.rows("dropped.jsonl")
    assert dropped["reason"] == "refused by a model" and "scripted 400" in dropped["detail"]
    assert dropped["journal"][0]["result"] == "refusal" and len(place.rows()) == 2


def test_a_server_that_does_not_work_ends_the_run(place: Place) -> None:
    """Also where the recipe swallows every error. What was answered before is kept."""
    body = (
        'try:\n    reply = await task.ask("a", row["task"])\n'
        'except Exception:\n    raise Dropped("swallowed")\n' + _row()
    )
    place.add_tasks("right", "right", "right", "right")

    def broken(body: dict[str, Any], attempt: int) -> str | None:
        return "503" if "print 3," in body["messages"][0]["content"] else None

    with ScriptedServer(fault=broken) as server:
        place.server.close()
        place.server = server
        backend = {"kind": "server", "url": server.url, "served_model": "m", "retries": 1, "timeout": 5.0}
        models = {"author": {"model": "m", "backend": backend}}
        with pytest.raises(BadServer):
            place.run(recipe=_recipe(place, body), models=models, rows_in_flight=1)
        assert place.asked() == 5
    with ScriptedServer() as server:
        place.server = server
        backend["url"] = server.url
        assert "4 rows from 4 of 4" in place.run(recipe=_recipe(place, body), models=models)
        assert place.asked() == 1


def test_numbers_at_random_are_the_same_in_each_run(place: Place) -> None:
    body = 'reply = await task.ask("a", f"{task.random.random()} {task.id}")\n' + _row()
    place.add_tasks("right", "wrong")
    place.run(recipe=_recipe(place, body))
    place.run(recipe=_recipe(place, body), max_failed=0.5)
    first, second = place.server.requests
    assert first["messages"] != second["messages"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = ", "cannot be loaded: SyntaxError"),
        ("VERSION = 1", "it needs `async def recipe"),
        ("VERSION = 1\ndef recipe(row, task): ...", "it needs `async def recipe"),
        ("async def recipe(row, task): ...", "VERSION, a whole number"),
        ("VERSION = True\nasync def recipe(row, task): ...", "VERSION, a whole number"),
        ("VERSION = 1\nMODELS = 'author'\nasync def recipe(row, task): ...", "MODELS, a tuple"),
        ("VERSION = 1\ndef prepare(): ...\nasync def recipe(row, task): ...", "prepare, a function with one"),
        ("VERSION = 1\nSettings = dict\nasync def recipe(row, task): ...", "Settings, a `Section`"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ValueError, match=r"own\.py: it ") as error:
        load_recipe(str(tmp_path / "own.py"))
    assert message in str(error.value)


def test_built_in_recipes_are_found_by_name() -> None:
    for name in built_in_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.summary
    with pytest.raises(ValueError, match="no recipe has this name"):
        load_recipe("code_exection")


def test_models_have_other_names(place: Place) -> None:
    head = HEAD + 'MODELS = ("author", "judge")\n'
    body = 'await task.ask("a", "q")\nreply = await task.ask("b", "q", model="judge")\n' + _row()
    recipe = _recipe(place, body, head=head)
    place.add_tasks("right")
    author = {"model": "m", "backend": {"kind": "server", "url": place.server.url, "served_model": "m"}}
    place.run(recipe=recipe, models={"author": author, "judge": "author"})
    assert place.asked() == 1  # the same model and the same request
    other = {**author, "model": "n"}
    place.run(recipe=recipe, models={"author": author, "judge": other})
    assert place.asked() == 1
    assert place.rows()[0]["provenance"]["models"] == {"author": "m", "judge": "n"}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"author": author}, "asks 'judge', which is missing"),
        ({"author": author, "judge": "autor"}, r"models: .*judge: 'autor' .* \(did you mean 'author'\?\)"),
        ({"author": "judge", "judge": "author"}, r"author: 'author' is not the name of a model here$"),
        (
            {"author": author, "judge": "author", "third": other},
            "models.third: recipe own asks author, judge",
        ),
        (
            {"author": author | {"backend": author["backend"] | {"url": "x"}}},
            r"models\.author\.backend\.url: ",
        ),
    ]
    for models, message in wrong:
        with pytest.raises(ConfigError, match=message):
            place.run(recipe=recipe, models=models)
    with pytest.raises(ConfigError, match="settings of recipe own: 1 error"):
        place.run(recipe=recipe, models={"author": author, "judge": "author"}, settings={"tires": 1})


@pytest.mark.parametrize(
    ("text", "languages", "found"),
    [
        ("no code", (), []),
        ("```python\na\n```\ntext\n```\nb\n```", ("python",), ["a\n", "b\n"]),
        ("```js\na\n```\n```Python x\nb\n```", ("python", "py"), ["b\n"]),
        ("````md\n```\na\n```\n````", (), ["```\na\n```\n"]),
        ("```python\ncut off", ("python",), ["cut off"]),
        ("x = '```'", (), []),
    ],
)
def test_code_blocks(text: str, languages: tuple[str, ...], found: list[str]) -> None:
    assert code_blocks(text, *languages) == found
