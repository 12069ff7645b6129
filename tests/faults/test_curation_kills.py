"""kill -9 at random moments of `curate`, with a judge that has faults: the bytes of an undisturbed run."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.documentation import ROOT
from tests.faults.conftest import FIGURES
from tests.scripted_server import Body, ScriptedServer, by_rates, digest

_ALL = bool(os.environ.get("FAULT_TESTS"))
KILLS = int(os.environ.get("CURATION_KILLS", 20 if _ALL else 3))
ROWS, PART_ROWS = 120 if _ALL else 48, 8
FAULTS = {"400": 0.03, "null": 0.02, "429": 0.1, "500": 0.05, "503": 0.05, "hang up": 0.05, "half": 0.05}


def answer(body: Body) -> str:
    """An answer that follows from a hash of the request. Some are off the scale."""
    text, draw = body["messages"][-1]["content"], int(digest(body)[:6], 16)
    mark = ("yes", "yes", "yes", "no", "5")[draw % 5]
    if "You sort dialogs" in text:
        return f"Topic: {('mathematics / algebra', 'code / debugging', 'cooking')[draw % 3]}"
    if "You tag" in text:
        return "Tags: " + "; ".join(f"tag {n}" for n in range(draw % 4 + 1))
    if "how difficult" in text:
        return f"Difficulty: {draw % 4}"
    return f"Accuracy: yes\nInstructions: {mark}\nTone: yes\nFree of bugs: {mark}\nIntent: yes"


class _Run:
    """A run and its judge."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory, self.output = directory, directory / "run"
        self.server = ScriptedServer(answer, by_rates(FAULTS, attempts=1), seconds=0.01)
        rows = directory.parent / "rows.jsonl"  # rows name their place: both runs have the same input
        rows.write_text("".join(json.dumps(_row(number)) + "\n" for number in range(ROWS)))
        backend = {"kind": "server", "url": self.server.url, "served_model": "m", "timeout": 5.0}
        rule = {"name": "even", "pattern": r"[02468]$", "max_share": 0.4}
        opening = {"name": "opening", "pattern": "^sure! ", "replace": ""}
        reward = {"name": "helpful", "models": ["rm"]}
        settings = {
            "run": str(self.output),
            "sources": [{"name": "rows", "path": str(rows)}],
            "models": {"judge": {"model": "m", "backend": {**backend, "parallel_requests": 8}}},
            "part_rows": PART_ROWS,
            "rows_in_flight": 4,
            "max_failed": 1.0,
            "steps": [
                {"kind": "clean", "rules": [opening, rule]},
                {"kind": "exact_duplicates"},
                {"kind": "topics", "taxonomy": str(ROOT / "configs/curation/topics.yaml"), "judge": "judge"},
                {"kind": "quality", "reward": [reward], "scores": {"rm": {"column": "score"}},
                 "topics": "topics", "per_topic": True, "marks": {"judge": "judge", "code_topics": ["code"]}},
                {"kind": "difficulty", "tags": "judge", "rating": "judge"},
            ],
        }  # fmt: skip
        self._config = directory / "curation.yaml"
        self._config.write_text(yaml.safe_dump(settings))

    def start(self, size: int) -> list["subprocess.Popen[bytes]"]:
        command = [sys.executable, "-m", "megatron_post", "curate", str(self._config), "--size", str(size)]
        log = (self.directory / "log").open("ab")
        return [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=log, stderr=log) for rank in range(size)
        ]

    def finish(self, size: int) -> None:
        for process in self.start(size):
            assert process.wait(300) == 0, (self.directory / "log").read_text()[-3000:]

    def progress(self) -> int:
        """The number of files of columns and of complete lines of the journal."""
        lines = [path.read_bytes().count(b"\n") for path in self.output.glob("journal/journal-*.jsonl")]
        return sum(lines) + sum(1 for _ in self.output.glob("columns/*/*.parquet"))

    def bytes(self) -> dict[str, bytes]:
        """Every file but the journal and locks."""
        files = [file for file in sorted(self.output.rglob("*")) if file.is_file()]
        return {
            str(file.relative_to(self.output)): file.read_bytes()
            for file in files
            if "journal" not in file.relative_to(self.output).parts and file.name != ".lock"
        }


def _row(number: int) -> dict[str, Any]:
    """The last six rows repeat the first ones, with other scores."""
    text = number % (ROWS - 6)
    texts = (f"question {text}", f"{'Sure! ' * (text % 3 == 0)}answer {text}")
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return {"messages": messages, "score": number * 7 % 11}


def test_kills_change_no_byte(tmp_path: Path) -> None:
    undisturbed, run = _Run(tmp_path / "undisturbed"), _Run(tmp_path / "killed")
    undisturbed.finish(1)
    expected, total = undisturbed.bytes(), undisturbed.progress()
    report = json.loads(expected["report.json"])
    assert 0 < report["kept"] < ROWS
    assert {step["kind"] for step in report["steps"] if step["dropped"]} == {
        "clean",
        "exact_duplicates",
        "quality",
    }
    assert {step["kind"] for step in report["steps"] if step["failed"]} >= {"topics", "quality"}

    rng = random.Random(KILLS)
    for target in sorted(rng.sample(range(1, total * 4 // 5), KILLS)):
        processes = run.start(rng.choice((1, 2, 3)))
        while run.progress() < target and any(process.poll() is None for process in processes):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        for process in processes:
            process.kill()
        codes = {process.wait() for process in processes}
        assert -9 in codes, (run.directory / "log").read_text()[-3000:]
        assert codes <= {-9, 0}, (run.directory / "log").read_text()[-3000:]
    run.finish(rng.choice((1, 2, 3)))
    assert run.bytes() == expected
    FIGURES.append(f"curate: {KILLS} kills in a run of {total} answers and files, the same bytes")
    for each in (undisturbed, run):
        each.server.close()


def test_kills_while_the_rows_the_mixture_and_the_page_are_written(tmp_path: Path) -> None:
    stride = 1 if _ALL else 7
    command = [sys.executable, "-m", "tests.faults.killed_selection", str(tmp_path), str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert counts["tried"] == len(range(1, counts["moments"] + 1, stride)) > 3
    FIGURES.append(f"curate: {counts['tried']} kills while the selection is written, the same bytes")
