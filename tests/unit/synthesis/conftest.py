"""A directory with the recipe of docs/synthesis/own_recipe.md, its tasks, and the server that it asks."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_post.storage.files import read_lines
from megatron_post.synthesis.run import synthesize
from megatron_post.synthesis.settings import load_synthesis
from tests.scripted_server import ScriptedServer
from tests.unit.synthesis.author import answer, write_config, write_recipe, write_tasks


@dataclass
class Place:
    """Where a run takes place."""

    directory: Path
    server: ScriptedServer

    @property
    def output(self) -> Path:
        return self.directory / "output"

    def add_tasks(self, *manners: str, first: int = 0) -> None:
        write_tasks(self.directory / "tasks.jsonl", *manners, first=first)

    def config(self, **values: Any) -> Path:
        return write_config(self.directory, self.server.url, **values)

    def run(self, *, rank: int = 0, size: int = 1, **values: Any) -> str:
        """Run one process. Returns what it printed."""
        console = Console(file=io.StringIO(), width=300)
        settings = load_synthesis(str(self.config(**values)))
        synthesize(settings, rank=rank, size=size, console=console)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    def rows(self, name: str = "rows.jsonl") -> list[dict[str, Any]]:
        return list(read_lines(self.output / name))

    def bytes(self) -> dict[str, bytes]:
        """The files of a finished run, without the record that names where it was."""
        names = ("rows.jsonl", "dropped.jsonl", "report.html")
        return {name: (self.output / name).read_bytes() for name in names}

    def asked(self) -> int:
        """Requests since the last call."""
        count = len(self.server.requests)
        self.server.requests.clear()
        return count


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    write_recipe(tmp_path)
    with ScriptedServer(answer) as server:
        yield Place(tmp_path, server)
