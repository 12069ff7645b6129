"""A directory in which a curation runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megatron_post.curation.run import curate
from megatron_post.curation.settings import Curation, load_curation
from megatron_post.display import make_console
from megatron_post.rounds.ranking import open_ranker


def dialog(*texts: str) -> dict[str, Any]:
    """A row with the texts of the user and the assistant in turn."""
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)],
    }


class Place:
    """Writes sources and settings, and runs the curation."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run = directory / "run"
        self.values: dict[str, Any] = {"run": str(self.run), "sources": [], "steps": []}

    def add_source(self, name: str, rows: Sequence[Mapping[str, Any]], **keys: Any) -> None:
        path = self.directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.values["sources"].append({"name": name, "path": str(path), **keys})

    def add_judge(self, url: str, name: str = "judge", *, retries: int = 2) -> None:
        """A model that a server at this address answers for."""
        backend = {"kind": "server", "url": url, "served_model": "m", "retries": retries}
        self.values.setdefault("models", {})[name] = {"model": name, "backend": backend}

    def settings(self) -> Curation:
        path = self.directory / "curation.yaml"
        path.write_text(yaml.safe_dump(self.values, sort_keys=False))
        return load_curation(str(path))

    def curate(self, *steps: Mapping[str, Any], rank: int = 0, size: int = 1, **keys: Any) -> dict[str, Any]:
        """Run with these steps, if any, and other keys. Returns the report."""
        if steps:
            self.values["steps"] = list(steps)
        self.values |= keys
        return curate(self.settings(), rank=rank, size=size, open_ranker=open_ranker, console=self.console())

    def console(self) -> Console:
        return make_console(quiet=True)

    def rows(self, name: str = "rows.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / name).read_text().splitlines()]

    def dropped(self) -> list[str | None]:
        """The reason for each row that is dropped, in order."""
        return [row["curation"]["dropped_by"]["reason"] for row in self.rows("dropped.jsonl")]

    def notes(self, step: str) -> list[dict[str, Any]]:
        """The annotations of all rows by a step, first of the kept and then of the dropped ones."""
        rows = [*self.rows(), *self.rows("dropped.jsonl")]
        return [row["curation"]["steps"].get(step, {}) for row in rows]

    def times(self) -> dict[str, int]:
        """The time at which each file of the columns was written."""
        files = sorted(self.run.glob("columns/**/*.parquet"))
        return {str(file.relative_to(self.run)): file.stat().st_mtime_ns for file in files}

    def bytes(self) -> dict[str, bytes]:
        """The content of every file that the run has written, but the journal."""
        files = [file for file in sorted(self.run.rglob("*")) if file.is_file()]
        return {
            str(file.relative_to(self.run)): file.read_bytes()
            for file in files
            if "journal" not in file.parts and file.name != ".lock"
        }
