"""kill -9 at random moments of `synthesize run`, over a server with faults: the bytes of an undisturbed run.

What may be asked again is defined by the journal: a request whose answer has no whole line in it when the
process dies. These are at most the requests that were in flight. Whatever has a line is never sent again.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documentation import ROOT
from tests.faults.conftest import FIGURES
from tests.scripted_server import Answer, ScriptedServer, by_rates
from tests.unit.synthesis import adding, director, instructor, quiz
from tests.unit.synthesis.languages import translator

_ALL = bool(os.environ.get("FAULT_TESTS"))
KILLS = int(os.environ.get("SYNTHESIS_KILLS", 20 if _ALL else 3))
ROWS_IN_FLIGHT = 6
FAULTS = {
    **{"400": 0.04, "422": 0.02, "null": 0.03, "429": 0.1, "500": 0.08, "503": 0.05},
    **{"hang": 0.02, "hang up": 0.05, "half": 0.06, "nonsense": 0.04},
}
_FAULT = by_rates(FAULTS, attempts=1)


@dataclass(frozen=True)
class _Recipe:
    """A recipe with its settings, its input and the author that answers.

    at_once: the largest number of requests that one input row sends at a time.
    has_programs: whether it needs a sandbox. others: the other models that it asks, which are the author too.
    """

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    answer: Answer
    at_once: int
    has_programs: bool = False
    others: tuple[str, ...] = ()


ADDING = _Recipe(
    name=str(ROOT / "tests/unit/synthesis/adding.py"),
    settings={"samples": 3},
    rows=[{"number": number} for number in range(60 if _ALL else 24)],
    answer=adding.answer,
    at_once=3,
    has_programs=True,
)
SELF_INSTRUCT = _Recipe(  # has generations, for which the processes wait for each other
    name="self_instruct",
    settings={"instructions": 120 if _ALL else 25, "batches": 6},
    rows=instructor.seeds(20),
    answer=instructor.answer,
    at_once=1,
)
FACTUALITY = _Recipe(
    name="factuality",
    settings={},
    rows=[{"text": quiz.snippet(manner, 10 * n)} for n, manner in enumerate(quiz.MANNERS, start=1)],
    answer=quiz.answer,
    at_once=16,
    others=("policy", "judge"),
)
STEERABILITY = _Recipe(  # makes preferences
    name="steerability",
    settings={"variants": 2, "turns": 2, "samples": 3},
    rows=[director.seed(manner) for manner in director.MANNERS],
    answer=director.answer,
    at_once=6,
    others=("judge",),
)
TRANSLATED = _Recipe(
    name="translated_reasoning",
    settings={"languages": ["de", "hi", "th"], "columns": {"user": "question", "assistant": "answer"}},
    rows=[translator.row(name, 1200 + n, 35) for n, name in enumerate(5 * translator.BAKERS)],
    answer=translator.answer,
    at_once=1,
    others=("judge",),
)
RECIPES = [
    pytest.param(ADDING, id="rows"),
    pytest.param(SELF_INSTRUCT, id="generations"),
    *(
        pytest.param(recipe, id=recipe.name, marks=pytest.mark.skipif(not _ALL, reason="set FAULT_TESTS=1"))
        for recipe in (FACTUALITY, STEERABILITY, TRANSLATED)
    ),
]


class _Run:
    """A run and its server. Every process of it is one of several, which share its input."""

    def __init__(self, directory: Path, recipe: _Recipe) -> None:
        directory.mkdir()
        self.output = directory / "output"
        self.log = directory / "server.jsonl"
        self.server = ScriptedServer(recipe.answer, _FAULT, log=self.log, seconds=0.02)
        rows = directory.parent / "rows.jsonl"  # rows name their place: both runs have the same input
        rows.write_text("".join(json.dumps(row) + "\n" for row in recipe.rows))
        backend = {"kind": "server", "url": self.server.url, "served_model": "m", "timeout": 5.0}
        settings = {
            "recipe": recipe.name,
            "settings": recipe.settings,
            "input": {"kind": "rows", "path": str(rows)},
            "models": {
                "author": {"model": "m", "backend": {**backend, "parallel_requests": 8}},
                **dict.fromkeys(recipe.others, "author"),
            },
            "rows_in_flight": ROWS_IN_FLIGHT,
            "max_failed": 1.0,
            "output": str(self.output),
        }
        if recipe.has_programs:
            settings["sandbox"] = {"kind": "bubblewrap", "limits": {"seconds": 60.0}}
        self._config = directory / "run.yaml"
        self._config.write_text(yaml.safe_dump(settings))

    def start(self, size: int) -> list["subprocess.Popen[bytes]"]:
        command = [sys.executable, "-m", "megatron_post", "synthesize", "run", str(self._config)]
        log = (self.output.parent / "log").open("ab")
        return [
            subprocess.Popen([*command, "--rank", str(rank), "--size", str(size)], stdout=log, stderr=log)
            for rank in range(size)
        ]

    def finish(self, size: int) -> None:
        for process in self.start(size):
            assert process.wait(300) == 0, (self.output.parent / "log").read_text()[-3000:]

    def journalled(self) -> list[dict[str, Any]]:
        """The whole lines of the journal."""
        lines = [
            line
            for path in sorted(self.output.glob("journal/journal-*.jsonl"))
            for line in path.read_bytes().splitlines(keepends=True)
            if line.endswith(b"\n")
        ]
        return [json.loads(line) for line in lines]

    def requests_in_journal(self) -> set[str]:
        entries = [line["entry"] for line in self.journalled() if line["kind"] != "program"]
        return {_identity(entry["request"]) for entry in entries}

    def answered(self) -> Counter[str]:
        """Usable answers that the server has sent whole, by request."""
        lines = map(json.loads, self.log.read_text().splitlines())
        return Counter(_identity(line["body"]) for line in lines if line["status"] == 200)

    def bytes(self) -> dict[str, bytes]:
        names = ("rows.jsonl", "preferences.jsonl", "dropped.jsonl", "report.html")
        return {name: (self.output / name).read_bytes() for name in names if (self.output / name).exists()}


def _identity(request: dict[str, Any]) -> str:
    """Names a request of the journal and a body that the server has read alike."""
    return json.dumps([request["messages"], request["seed"]], sort_keys=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_kills_change_no_byte_and_ask_nothing_twice(tmp_path: Path, recipe: _Recipe) -> None:
    undisturbed, run = _Run(tmp_path / "undisturbed", recipe), _Run(tmp_path / "killed", recipe)
    undisturbed.finish(1)
    expected, total = undisturbed.bytes(), len(undisturbed.journalled())
    assert expected["dropped.jsonl"] and expected["rows.jsonl"]
    assert undisturbed.requests_in_journal() == {_identity(body) for body in undisturbed.server.requests}

    rng = random.Random(KILLS)
    known: set[str] = set()  # requests whose answer was in the journal at a kill
    lost: Counter[str] = Counter()  # kills at which a request was in flight
    for target in sorted(rng.sample(range(1, total * 4 // 5), KILLS)):
        size = rng.choice((1, 2, 3))
        before = len(run.server.requests)
        processes = run.start(size)
        while len(run.journalled()) < target and any(process.poll() is None for process in processes):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        for process in processes:
            process.kill()
        codes = {process.wait() for process in processes}
        assert -9 in codes, "the run ended before it was killed"
        assert codes <= {-9, 0}, (run.output.parent / "log").read_text()[-3000:]  # a part may be finished
        asked = [_identity(body) for body in run.server.requests[before:]]
        assert not known & {*asked}, "a request was sent whose answer was in the journal"
        known = run.requests_in_journal()
        in_flight = {*asked} - known
        assert len(in_flight) <= recipe.at_once * ROWS_IN_FLIGHT * size
        lost.update(in_flight)
    before = len(run.server.requests)
    run.finish(rng.choice((1, 2, 3)))
    assert not known & {_identity(body) for body in run.server.requests[before:]}
    assert run.bytes() == expected
    again = {request: count - undisturbed.answered()[request] for request, count in run.answered().items()}
    assert all(count <= lost[request] for request, count in again.items())
    more = sum(count for count in again.values() if count > 0)
    FIGURES.append(
        f"synthesize {Path(recipe.name).stem}: {KILLS} kills in a run of {total} requests and programs, the "
        f"same bytes; {more} requests were answered again, all of them in flight at a kill"
    )
    for each in (undisturbed, run):
        each.server.close()
