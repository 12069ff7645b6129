"""Self-Instruct over a scripted author: what comes into the pool, what is dropped, and after kills."""

import io
import json
import math
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from megatron_post.config.data import Source
from megatron_post.data.dialog import Dialog
from megatron_post.data.rows import BadRows, read_rows
from megatron_post.storage.files import read_lines
from megatron_post.storage.reading import read_object
from megatron_post.synthesis.run import synthesize
from megatron_post.synthesis.settings import load_synthesis
from tests.scripted_server import ScriptedServer
from tests.unit.synthesis.instructor import answer, seeds

pytest.importorskip("rapidfuzz")

from megatron_post.synthesis.rouge import RougePool, rouge_l

REAL_SEEDS = Path(__file__).parents[4] / "shared/data/self_instruct/seed_tasks.jsonl"
IN_FLIGHT = 16
FILES = ("rows.jsonl", "dropped.jsonl", "report.html")


@dataclass
class Instructions:
    """Where a run takes place."""

    directory: Path
    server: ScriptedServer
    seeds: list[dict[str, Any]] = field(default_factory=list)

    def run(
        self,
        output: str = "output",
        *,
        rank: int = 0,
        size: int = 1,
        seeds: Path | None = None,
        **settings: Any,
    ) -> str:
        path = seeds or self.directory / "seeds.jsonl"
        text = "".join(json.dumps(seed) + "\n" for seed in self.seeds)
        if seeds is None and (not path.exists() or path.read_text() != text):
            path.write_text(text)  # other processes may be reading it
        backend = {"kind": "server", "url": self.server.url, "served_model": "author", "retries": 1}
        values = {
            "recipe": "self_instruct",
            "settings": settings,
            "input": {"kind": "rows", "path": str(path)},
            "models": {"author": {"model": "author", "backend": backend}},
            "rows_in_flight": IN_FLIGHT,
            "output": str(self.directory / output),
        }
        file = self.directory / f"{output}-{rank}.yaml"
        file.write_text(yaml.safe_dump(values))
        console = Console(file=io.StringIO(), width=300)
        synthesize(load_synthesis(str(file)), rank=rank, size=size, console=console)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    def rows(self, name: str = "rows.jsonl", output: str = "output") -> list[dict[str, Any]]:
        return list(read_lines(self.directory / output / name))

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = read_object(self.directory / "output/summary.json", "summary")["summary"]
        return found

    def bytes(self, output: str = "output") -> dict[str, bytes]:
        return {name: (self.directory / output / name).read_bytes() for name in FILES}

    def asked(self) -> int:
        count = len(self.server.requests)
        self.server.requests.clear()
        return count


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Instructions]:
    with ScriptedServer(answer) as server:
        yield Instructions(tmp_path, server, seeds(20))


def _instructions(place: Instructions) -> list[str]:
    return list(dict.fromkeys(row["instruction"] for row in place.rows()))


def _check_pool(place: Instructions, seeds: list[str]) -> None:
    """No instruction that is kept is within 0.7 of a seed or of an earlier one, and each close one is."""
    pool = RougePool(seeds)
    for instruction in _instructions(place):
        closest = pool.closest(instruction)
        assert closest is not None and closest[0] < 0.7
        pool.add(instruction)
    for row in place.rows("dropped.jsonl"):
        if row["reason"] == "the instruction is too close to one of the pool":
            text, close = row["detail"].split("\n")
            figure, _, other = close.removeprefix("ROUGE-L ").partition(" to: ")
            assert float(figure) == round(rouge_l(text, other), 3) >= 0.7


def test_every_instruction_has_its_way(place: Instructions) -> None:
    printed = place.run(instructions=60, batches=8)
    _check_pool(place, [seed["instruction"] for seed in place.seeds])
    summary, dropped = place.summary(), place.rows("dropped.jsonl")
    reasons = Counter(row["reason"] for row in dropped)
    replies = summary["steps"]["write"]["requests"] - reasons["the reply has no numbered instruction"]
    cut = summary["steps"]["write"]["results"]["the last instruction is cut off"]
    assert reasons["the instruction has the word 'draw'"] == replies
    assert reasons["the instruction is too close to one of the pool"] == 2 * replies
    others = 8 * replies - cut - 3 * replies  # the five that are not planted
    kept = _instructions(place)
    lost = ("no example can be used", "the answer to whether it is classification is neither yes nor no")
    assert len(kept) + sum(reasons[each] for each in lost) == others and all(reasons[each] for each in lost)
    assert summary["steps"]["pool"]["results"]["new instruction"] == others
    assert others >= 60 and summary["failed"] == 0 and "0 failed" in printed
    assert set(reasons) == {
        "the reply has no numbered instruction",
        "the instruction has the word 'draw'",
        "the instruction is too close to one of the pool",
        *lost,
    }
    assert summary["kinds"].keys() == {
        "general / classification",
        "general / generation",
        "general / generation without input",
    }


def test_a_prompt_has_six_seeds_and_two_generated_instructions(place: Instructions) -> None:
    place.run(instructions=60, batches=8)
    seeds = {seed["instruction"][0].upper() + seed["instruction"][1:] for seed in place.seeds}
    shown = []
    for request in place.server.requests:
        text = request["messages"][0]["content"]
        if text.startswith("Here is a list"):
            lines = [line.partition(". ")[2] for line in text.split("\n") if line[:1].isdigit()]
            shown.append(sum(line in seeds for line in lines))
            assert len(lines) == 8
    assert Counter(shown) == {8: 8, 6: len(shown) - 8} and len(shown) > 8


def test_statistics_equal_counts_by_hand(place: Instructions) -> None:
    place.run(instructions=20, batches=4)
    rows, measures = place.rows(), place.summary()["measures"]
    instructions = _instructions(place)
    seeds = [seed["instruction"] for seed in place.seeds]
    by_hand = {
        "ROUGE-L of an instruction to the nearest seed": [
            round(max(rouge_l(text, seed) for seed in seeds), 4) for text in instructions
        ],
        "words of an instruction": [len(text.split()) for text in instructions],
        "words of an input that is not empty": [len(row["input"].split()) for row in rows if row["input"]],
        "words of an output": [len(row["messages"][1]["content"].split()) for row in rows],
    }
    assert measures.keys() == by_hand.keys()
    for name, values in by_hand.items():
        assert measures[name]["number"] == len(values)
        assert measures[name]["total"] == pytest.approx(sum(values))
        counts = Counter(math.floor(value * 100 + 1e-7) / 100 for value in values)
        assert {float(value): count for value, count in measures[name]["counts"].items()} == counts
    kept = place.summary()["steps"]["kept"]["results"]
    assert sum(kept.values()) == len(instructions)
    labelled = {row["instruction"] for row in rows if row["kind"].startswith("classification")}
    assert kept["classification instruction"] == len(labelled)
    page = (place.directory / "output/report.html").read_text()
    assert page.count("<figure>") == 4 and "ROUGE-L of an instruction to the nearest seed" in page


def test_rows_pack_as_they_are(place: Instructions) -> None:
    place.run(instructions=20, batches=4)
    source = Source(name="s", path=str(place.directory / "output/rows.jsonl"))
    found = [example for _, example in read_rows(source, bad_rows=BadRows())]
    assert len(found) == len(place.rows()) and all(isinstance(each, Dialog) for each in found)


@pytest.mark.parametrize("after", [1, 9, 30, 60])
def test_a_killed_run_resumes_to_the_same_bytes(
    place: Instructions, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    settings = {"instructions": 40, "batches": 8}
    place.run("whole", **settings)
    asked = place.asked()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        _interrupt(patched, after)
        place.run(**settings)
    place.run(**settings)
    assert place.asked() <= asked + IN_FLIGHT and place.bytes() == place.bytes("whole")


def _interrupt(patched: pytest.MonkeyPatch, after: int) -> None:
    """A Ctrl-C at the end of the n-th input row."""
    from megatron_post.synthesis import run

    real, left = run.attempt, [after]

    async def attempt(*arguments: Any) -> Any:
        result = await real(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return result

    patched.setattr(run, "attempt", attempt)


def test_any_number_of_processes_writes_the_same_bytes(place: Instructions) -> None:
    settings = {"instructions": 40, "batches": 7}
    place.run(**settings)
    expected, asked = place.bytes(), place.asked()
    printed: list[str] = []

    def run(rank: int) -> None:
        printed.append(place.run("other", rank=rank, size=3, **settings))

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(printed) == 3 and place.bytes("other") == expected and place.asked() == asked


def test_more_instructions_ask_only_what_is_new(place: Instructions) -> None:
    place.run(instructions=20, batches=4)
    before = place.rows()
    first = place.asked()
    place.run(instructions=60, batches=4)
    second = place.asked()
    place.run("other", instructions=60, batches=4)
    assert place.asked() == first + second
    assert place.rows(output="other") == place.rows()
    kept = {row["id"] for row in place.rows()}
    assert {row["id"] for row in before} <= kept


def test_an_author_without_new_instructions_ends_the_run(place: Instructions) -> None:
    with ScriptedServer(lambda body: "9. Write the same instruction again") as server:
        place.server = server
        place.run(instructions=100, batches=4)
    assert place.summary()["steps"]["write"]["requests"] == 8  # the second generation adds nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": 5}, "row 1: instruction: Input should be a valid string"),
        ({"is_classification": "no"}, "row 1: is_classification: Input should be a valid boolean"),
        ({"instruction": ""}, "row 1: instruction: String should have at least 1 character"),
    ],
)
def test_seeds_in_another_form_are_refused(place: Instructions, change: dict[str, Any], message: str) -> None:
    place.seeds[0] |= change
    with pytest.raises(ValueError, match=message):
        place.run()
    assert place.asked() == 0


def test_too_few_seeds_are_refused(place: Instructions) -> None:
    place.seeds = place.seeds[:7]
    with pytest.raises(ValueError, match="7 seed tasks; a prompt needs 8"):
        place.run()


@pytest.mark.skipif(not REAL_SEEDS.exists(), reason="the seed tasks of Self-Instruct are not here")
def test_two_thousand_instructions_from_the_real_seeds(place: Instructions) -> None:
    place.run(seeds=REAL_SEEDS, instructions=1200, batches=140)
    seeds = [json.loads(line)["instruction"] for line in REAL_SEEDS.read_text().splitlines()]
    written = place.summary()["input"] - place.summary()["steps"]["write"]["rows"]
    assert len(seeds) == 175 and written >= 2000
    _check_pool(place, seeds)
