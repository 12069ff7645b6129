"""The recipes for tools over a real Llama behind real HTTP."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_post.synthesis.run import synthesize
from megatron_post.synthesis.settings import load_synthesis
from tests.by_heart import llama_with_replies
from tests.chat_server import ChatServer
from tests.scripted_server import Answer
from tests.unit.rounds.models import tiny_policy
from tests.unit.synthesis.conftest import Place
from tests.unit.synthesis.tools.author import Script
from tests.unit.synthesis.tools.author import author as caller
from tests.unit.synthesis.tools.conftest import ToolPlace
from tests.unit.synthesis.tools.test_tool_functions import OSLO, PACKAGES, SOURCE, WARM
from tests.unit.synthesis.tools.test_tool_functions import author as writer

PYTHON = "code_interpreter"
SETTINGS: dict[str, dict[str, Any]] = {"tool_use": {"tools": [PYTHON]}, "tool_files": {}}


@pytest.mark.parametrize("recipe", SETTINGS)
def test_what_a_model_with_random_weights_writes_is_dropped(
    place: Place, tmp_path: Path, recipe: str
) -> None:
    text = "The mill was built in 1790, and it grinds three tons of wheat in a day.\n"
    model = tiny_policy(tmp_path / "model", text=text * 20, positions=8192)
    (tmp_path / "corpus").mkdir()
    for number in (1, 2):
        (tmp_path / f"corpus/{number}.txt").write_text(text * number)
    with ChatServer(model) as server:
        backend = {
            "kind": "server",
            "url": server.url,
            "served_model": "llama",
            "retries": 1,
            "timeout": 60.0,
        }
        author = {"model": "tiny", "backend": backend, "sampling": {"temperature": 1.0, "max_tokens": 16}}
        kind = "files" if recipe == "tool_files" else "documents"
        values = {
            "recipe": recipe,
            "settings": SETTINGS[recipe],
            "input": {"kind": kind, "path": str(tmp_path / "corpus")},
            "models": {"author": author, "judge": "author"},
        }
        place.run(**values)
        requests, before = server.requests, place.bytes()
        (place.output / "summary.json").unlink()
        place.run(**values)
        assert server.requests == requests == 2 and place.bytes() == before
    assert {(row["failed"], row["reason"]) for row in place.rows("dropped.jsonl")} <= {
        (False, "the request is cut off"),
        (False, "the reply has no request, or several"),
    }


STEPS = Script([(PYTHON, "x ="), (PYTHON, "x = 20"), (PYTHON, "print(x + 1)")], answer="It is 21.")
RUNS: dict[str, tuple[Answer, dict[str, Any]]] = {
    "tool_use": (
        caller({1: STEPS}),
        {"rows": [{"text": "case 1"}], "settings": {"tools": [PYTHON], "several": 1}},
    ),
    "tool_functions": (
        writer({1: [[WARM], [OSLO, WARM]]}),
        {
            "rows": [{"text": SOURCE.format(case="case 1")}],
            "packages": PACKAGES,
            "settings": {"kinds": ["nested"], "functions": 5},
        },
    ),
}


@pytest.mark.parametrize("recipe", RUNS)
def test_a_llama_that_gives_the_replies_of_a_script_makes_its_row(tool_place: ToolPlace, recipe: str) -> None:
    """Calls, outputs, corrections and the verdict pass through a real template and a real model."""
    answer, values = RUNS[recipe]
    settings = values["settings"]
    tool_place.run(recipe, answer, rows=values["rows"], packages=values.get("packages", ()), **settings)
    (expected,), bodies = tool_place.rows(), tool_place.requests
    model = tool_place.directory / "model"
    longest = llama_with_replies(model, [(body, answer(body)) for body in bodies])
    tool_place.output = tool_place.directory / "llama"
    greedy = ["models.author.sampling.temperature=0", f"models.author.sampling.max_tokens={longest}"]
    with ChatServer(model) as server:
        path = tool_place.write(recipe, server.url, **values)
        synthesize(load_synthesis(str(path), greedy), console=Console(file=io.StringIO()))
        assert server.requests == len(bodies) == (6 if recipe == "tool_use" else 4)
    (row,) = tool_place.rows()
    assert all(row[key] == expected[key] for key in ("messages", "tools", "kind"))
    assert len(row["messages"]) == (8 if recipe == "tool_use" else 6)
