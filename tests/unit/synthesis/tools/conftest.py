"""Runs of the built-in recipes for tools over the scripted server, with real tools."""

import importlib.util
import io
import json
import shutil
from collections import Counter
from collections.abc import Sequence
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
from tests.scripted_server import Answer, ScriptedServer

_DISTRIBUTIONS = {"docx": "python-docx", "docstring_parser": "docstring-parser"}  # by the name of the package


def sandbox_with(*packages: str) -> dict[str, Any]:
    """Settings of a sandbox whose programs can import packages. Skips the test if something is missing."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    directories = []
    for package in packages:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            pytest.skip(f"{_DISTRIBUTIONS.get(package, package)} is not installed")
        is_package = found.submodule_search_locations is not None
        directories.append(str(Path(found.origin).parents[1 if is_package else 0]))
    directories = list(dict.fromkeys(directories))
    return {
        "kind": "bubblewrap",
        "read_only": directories,
        "environment": {"PYTHONPATH": ":".join(directories)} if directories else {},
        "limits": {"seconds": 60, "cpu_seconds": 30},
    }


class ToolPlace:
    """Where runs take place. Each has a server that answers as the test says."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.output = directory, directory / "output"
        self.requests: list[dict[str, Any]] = []

    def run(
        self,
        recipe: str,
        answer: Answer,
        *,
        rows: Sequence[dict[str, Any]] = (),
        packages: Sequence[str] = (),
        input: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """rows: the input, unless `input` names another one."""
        with ScriptedServer(answer) as server:
            path = self.write(
                recipe, server.url, rows=rows, packages=packages, input=input, settings=settings
            )
            try:
                synthesize(load_synthesis(str(path)), console=Console(file=io.StringIO()))
            finally:
                self.requests = server.requests

    def write(
        self,
        recipe: str,
        url: str,
        *,
        rows: Sequence[dict[str, Any]] = (),
        packages: Sequence[str] = (),
        input: dict[str, Any] | None = None,
        settings: dict[str, Any],
    ) -> Path:
        """Write the settings of a run, which asks the server at `url`. Returns their path."""
        path = self.directory / "input.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        backend = {"kind": "server", "url": url, "served_model": "author", "retries": 1}
        values = {
            "recipe": recipe,
            "settings": settings,
            "input": input or {"kind": "rows", "path": str(path)},
            "models": {"author": {"model": "author", "backend": backend}, "judge": "author"},
            "sandbox": sandbox_with(*packages),
            "max_failed": 1.0,
            "output": str(self.output),
        }
        (self.directory / "run.yaml").write_text(yaml.safe_dump(values))
        return self.directory / "run.yaml"

    def rows(self) -> list[dict[str, Any]]:
        return list(read_lines(self.output / "rows.jsonl"))

    def dialogs(self) -> list[Dialog]:
        """The rows as `data pack` reads them."""
        source = Source(name="s", path=str(self.output / "rows.jsonl"))
        found = [example for _, example in read_rows(source, bad_rows=BadRows())]
        assert all(isinstance(example, Dialog) for example in found)
        return found  # type: ignore[return-value]

    def dropped(self) -> dict[int, tuple[str, str]]:
        """Step and reason of each line of the input that gave no row, with the detail if a row failed."""
        lines = read_lines(self.output / "dropped.jsonl")
        return {
            int(line["source"].rpartition(":")[2]): (
                line["step"],
                f"{line['reason']}: {line['detail']}" if line["failed"] else line["reason"],
            )
            for line in lines
        }

    def results(self, step: str) -> Counter[str]:
        """What the report counts at a step."""
        summary = read_object(self.output / "summary.json", "summary")["summary"]
        return Counter(summary["steps"][step]["results"])

    def bytes(self) -> dict[str, bytes]:
        names = ("rows.jsonl", "dropped.jsonl", "report.html")
        return {name: (self.output / name).read_bytes() for name in names}


@pytest.fixture
def tool_place(tmp_path: Path) -> ToolPlace:
    return ToolPlace(tmp_path)
