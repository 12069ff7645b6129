"""Runs of the built-in recipes of mathematics over the scripted server."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from megatron_post.storage.files import read_lines
from megatron_post.storage.reading import read_object
from megatron_post.synthesis.math.answers import MathAnswers
from megatron_post.synthesis.run import synthesize
from megatron_post.synthesis.settings import load_synthesis
from tests.scripted_server import ScriptedServer
from tests.unit.synthesis.math.author import answer, fault


@dataclass
class MathPlace:
    """Where a run takes place."""

    directory: Path
    server: ScriptedServer

    @property
    def output(self) -> Path:
        return self.directory / "output"

    def run(
        self,
        recipe: str,
        rows: Sequence[dict[str, Any]],
        *,
        judges: bool = True,
        sizes: int = 1,
        **settings: Any,
    ) -> None:
        """Write the input and the settings, and run the recipe in `sizes` processes, one after the other."""
        (self.directory / "input.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        backend = {"kind": "server", "url": self.server.url, "served_model": "author", "retries": 1}
        values = {
            "recipe": recipe,
            "settings": settings,
            "input": {"kind": "rows", "path": str(self.directory / "input.jsonl")},
            "models": {
                "author": {"model": "author", "backend": backend},
                **({"judge": "author"} if judges else {}),
            },
            "sandbox": {"kind": "bubblewrap", "limits": {"seconds": 20, "cpu_seconds": 1}},
            "max_failed": 1.0,
            "output": str(self.output),
        }
        if recipe != "math_interleaved":
            del values["sandbox"]
        path = self.directory / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        for rank in reversed(range(sizes)):
            found = load_synthesis(str(path))
            synthesize(found, rank=rank, size=sizes, console=Console(file=io.StringIO()))

    def rows(self) -> list[dict[str, Any]]:
        return list(read_lines(self.output / "rows.jsonl"))

    def reasons(self) -> Counter[tuple[str, str]]:
        """How many rows were dropped at each step, by reason."""
        return Counter((row["step"], row["reason"]) for row in read_lines(self.output / "dropped.jsonl"))

    def results(self, step: str) -> dict[str, int]:
        """What the report counts at a step."""
        found = read_object(self.output / "summary.json", "summary")["summary"]["steps"][step]
        return {**found["results"], **({"refused": found["refused"]} if found["refused"] else {})}

    def bytes(self) -> dict[str, bytes]:
        names = ("rows.jsonl", "dropped.jsonl", "report.html")
        return {name: (self.output / name).read_bytes() for name in names}


@pytest.fixture
def math_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MathPlace]:
    monkeypatch.setattr("megatron_post.synthesis.resources.MathAnswers", partial(MathAnswers, seconds=1))
    with ScriptedServer(answer, fault) as server:
        yield MathPlace(tmp_path, server)
