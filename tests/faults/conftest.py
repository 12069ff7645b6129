"""A tiny run, the result of an uninterrupted twin, and the figures that `make fault-test` prints."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_post.storage import manifest
from tests.e2e.runs import small_run
from tests.faults.incarnation import Incarnation

STEPS = 24
FIGURES: list[str] = []


@dataclass(frozen=True)
class Run:
    """A run directory, and the final weights and the losses of an uninterrupted twin."""

    config: Path
    directory: Path
    expected: dict[str, bytes]
    losses: dict[int, float]

    @property
    def root(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def published(self) -> list[int]:
        return manifest.published_steps(self.root)

    def start(self, *overrides: str, **options: object) -> Incarnation:
        """Start another incarnation of this run."""
        self.directory.mkdir(exist_ok=True)
        log = self.directory / f"log-{len(list(self.directory.glob('log-*')))}"
        where = f"run_dir={self.directory}"
        return Incarnation(self.config, where, *overrides, log=log, **options)  # type: ignore[arg-type]

    def check_end(self) -> None:
        """Check that weights and losses equal those of the uninterrupted run, bit for bit.

        The metrics must have each step once, even if it was repeated.
        """
        assert weights(self.directory) == self.expected
        assert losses(self.directory) == list(self.losses.items())


def weights(run_dir: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run_dir / "hf").glob("*.safetensors")}


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of each training line, in the order of the file."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def prepare(directory: Path, **sections: object) -> Run:
    """Write a store and a config into `directory`, and run them without interruption."""
    values: dict[str, dict] = {
        "model": {"num_layers": 2},
        "train": {"steps": STEPS, "global_batch": 4, "step_deadline": 120},
        "checkpoint": {"every": 2, "keep": 2},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}  # type: ignore[dict-item]
    small_run(directory, **values)
    whole = directory / "whole"
    run = Incarnation(directory / "config.yaml", f"run_dir={whole}", log=directory / "whole.log")
    assert run.wait() == [0, 0], run.output
    return Run(directory / "config.yaml", directory / "run", weights(whole), dict(losses(whole)))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def run(prepared: Run, tmp_path: Path) -> Run:
    """A fresh run directory."""
    return Run(prepared.config, tmp_path / "run", prepared.expected, prepared.losses)


@pytest.fixture
def whole_set() -> None:
    """Skips a test that only `make fault-test` runs."""
    if not os.environ.get("FAULT_TESTS"):
        pytest.skip("this test takes minutes and is run by `make fault-test`")


@pytest.fixture(scope="session", autouse=True)
def _print_figures() -> Iterator[None]:
    yield
    if FIGURES:
        print("\n" + "\n".join(FIGURES))
