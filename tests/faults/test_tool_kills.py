"""kill -9 at several moments of the recipes for tools: the bytes of an undisturbed run."""

import base64
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.scripted_server import Answer, ScriptedServer
from tests.unit.synthesis.tools.author import Script, towns
from tests.unit.synthesis.tools.author import author as caller
from tests.unit.synthesis.tools.conftest import ToolPlace
from tests.unit.synthesis.tools.test_tool_functions import OSLO, PACKAGES, ROME, SOURCE, WARM
from tests.unit.synthesis.tools.test_tool_functions import author as writer

PYTHON = "code_interpreter"
_ALL = bool(os.environ.get("FAULT_TESTS"))
KILLS, ROWS = (10, 30) if _ALL else (1, 4)


def _tool_use(directory: Path) -> tuple[Answer, dict[str, Any]]:
    (directory / "corpus").mkdir()
    for number in range(ROWS):
        (directory / f"corpus/{number}.txt").write_text(f"The mayor of town {number} is Ada.\n")
    documents = {"kind": "documents", "path": str(directory / "corpus")}
    rows = [{"text": f"A text about {number} towns."} for number in range(ROWS)]
    packages = ["sympy", "mpmath"]
    return towns, {"rows": rows, "packages": packages, "settings": {"documents": documents}}


def _tool_files(directory: Path) -> tuple[Answer, dict[str, Any]]:
    contents = [f"case {number}, and more".encode() for number in range(ROWS)]
    rows = [
        {"file": f"{number}.csv", "base64": base64.b64encode(content).decode()}
        for number, content in enumerate(contents)
    ]
    scripts = {
        number: Script([(PYTHON, "x ="), (PYTHON, f"print(open('{number}.csv').read())")])
        for number in range(ROWS)
    }
    return caller(scripts), {"rows": rows, "settings": {}}


def _tool_functions(directory: Path) -> tuple[Answer, dict[str, Any]]:
    calls = [[[OSLO, WARM]], [[OSLO, ROME], [ROME, WARM]], [[WARM]], ["NONE"]]
    replies = {number: calls[number % len(calls)] for number in range(ROWS)}
    rows = [{"text": SOURCE.format(case=f"case {number}")} for number in replies]
    settings = {"kinds": ["nested"], "functions": 5}
    return writer(replies), {"rows": rows, "packages": PACKAGES, "settings": settings}


RECIPES = {"tool_use": _tool_use, "tool_files": _tool_files, "tool_functions": _tool_functions}


@pytest.mark.parametrize("recipe", RECIPES)
def test_kills_change_no_byte(tmp_path: Path, recipe: str) -> None:
    place = ToolPlace(tmp_path)
    answer, values = RECIPES[recipe](tmp_path)
    with ScriptedServer(answer, seconds=0.02) as server:
        expected, lines = _run(place, recipe, server.url, values, "undisturbed"), _lines(place)
        assert expected["rows.jsonl"].count(b"\n") >= ROWS // 4
        rng = random.Random(0)
        for target in sorted(rng.sample(range(1, lines * 4 // 5), KILLS)):
            _run(place, recipe, server.url, values, "killed", kill_at=target)
        before = len(server.requests)
        assert _run(place, recipe, server.url, values, "killed") == expected
        assert len(server.requests) - before < lines


def _lines(place: ToolPlace) -> int:
    """Whole lines of the journal."""
    return sum(path.read_bytes().count(b"\n") for path in place.output.glob("journal/*.jsonl"))


def _run(
    place: ToolPlace, recipe: str, url: str, values: dict[str, Any], name: str, kill_at: int | None = None
) -> dict[str, bytes]:
    """The bytes of a run in a process of its own. kill_at: lines of the journal at which it is killed."""
    place.output = place.directory / name
    command = [
        sys.executable,
        "-m",
        "megatron_post",
        "synthesize",
        "run",
        str(place.write(recipe, url, **values)),
    ]
    log = place.directory / "log"
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    if kill_at is None:
        assert process.wait(300) == 0, log.read_text()[-3000:]
        return place.bytes()
    while _lines(place) < kill_at and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9, "the run ended before it was killed"
    return {}
