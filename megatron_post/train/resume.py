"""Finds the checkpoint that a run resumes from, and checks that the config may resume it."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from megatron_post.config.load import ConfigError, load_config, parse
from megatron_post.config.schema import Config
from megatron_post.config.settings import Change, RunSettings, compare, flatten
from megatron_post.convert.dist_checkpoint import DistCheckpoint
from megatron_post.convert.torch_file import load_plain
from megatron_post.display import say
from megatron_post.parallel.topology import Topology
from megatron_post.storage import manifest
from megatron_post.train.converted import check_weights


class State(BaseModel):
    """What the manifest of a step records about the run and its position.

    run: the id of the run. settings: the value of every key of the config. content: see `RunSettings`.
    weights_only: the checkpoint comes from a conversion and not from a run.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    run: str | None = None
    incarnation: str = ""
    settings: dict[str, Any] | None = None
    content: dict[str, str | None] = {}
    consumed_packs: int = Field(0, ge=0)
    world_size: int = 0
    weights_only: bool = False


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run resumes from.

    changes: settings that differ from the checkpoint's. passed_over: newer steps that cannot be used, and on
    the first rank also older steps of other runs.
    """

    source: DistCheckpoint
    step: int
    state: State
    changes: tuple[Change, ...]
    passed_over: frozenset[int]


@dataclass(frozen=True)
class Resuming:
    """Finds a run's checkpoint. run: the id of the run. content: see `RunSettings`."""

    config: Config
    topology: Topology
    root: Path
    run: str
    content: Mapping[str, str | None]

    @property
    def settings(self) -> RunSettings:
        return RunSettings(flatten(self.config), self.content)

    def find(self) -> Found | None:
        """The newest intact checkpoint of this run, or None if the directory has no checkpoint.

        Other checkpoints are passed over with a message. All ranks must call this method, and each verifies a
        part of the files. Raises `DamagedCheckpoint` if there are checkpoints but none can be used, and
        `ValueError` if the config belongs to another run than the checkpoint.
        """
        passed_over: dict[int, str] = {}
        steps = manifest.published_steps(self.root)
        for step in reversed(steps):
            directory = manifest.step_directory(self.root, step)
            source, problem = self._open(directory)
            # Each rank has verified a part only. All must agree before any of them takes this checkpoint.
            problems: list[Any] = [None] * self.topology.world_size
            torch.distributed.all_gather_object(problems, problem)
            problem = next((found for found in problems if found is not None), None)
            if problem is None:
                assert source is not None
                older = self._of_others(old for old in steps if old < step)
                return self._accept(source, step, older.union(passed_over))
            passed_over[step] = problem
            if self.topology.rank == 0:
                say(f"checkpoint of step {step} {problem}")
        if passed_over:
            newest = max(passed_over)
            raise manifest.DamagedCheckpoint(
                f"{self.root} has no intact checkpoint of this run: that of step {newest} "
                f"{passed_over[newest]}; restore one, or move all of them away to begin again"
            )
        return None

    def _open(self, directory: Path) -> tuple[DistCheckpoint | None, str | None]:
        """Open a checkpoint and verify this rank's part of it. Returns the reason if it is passed over."""
        share = {"part": self.topology.rank, "parts": self.topology.world_size}
        damaged = "is damaged and passed over"
        try:
            manifest.verify_step(directory, **share)
            state = _state_of(directory)
            if not self._is_own(state):
                return None, (
                    f"is of another run and passed over: {directory} is of run {state.run}, and this is run "
                    f"{self.run}. A run goes on from it in a run_dir of its own: copy it into an empty one"
                )
            # Checksums only find accidental damage. Whoever can write files can write fitting checksums, so
            # the content itself must be plain data that executes no code when it is loaded.
            load_plain(directory / "common.pt")
            source = DistCheckpoint(directory, is_verified=True)
            source.check_objects(**share)
        except ValueError as error:
            return None, f"{damaged}: {error}"
        except Exception as error:  # damage in a file that another process wrote can raise any error
            return None, f"{damaged}: {directory}: {error or type(error).__name__}".splitlines()[0]
        return source, None

    def _is_own(self, state: State) -> bool:
        """Whether a checkpoint may be this run's. Converted weights and earlier versions name no run."""
        return state.run in (None, self.run)

    def _of_others(self, steps: Iterable[int]) -> frozenset[int]:
        """The steps that belong to other runs.

        Only the first rank reads them, because it removes old steps.
        """
        found = set()
        for step in steps if self.topology.rank == 0 else ():
            with contextlib.suppress(ValueError):
                if not self._is_own(_state_of(manifest.step_directory(self.root, step))):
                    found.add(step)
        return frozenset(found)

    def _accept(self, source: DistCheckpoint, step: int, passed_over: frozenset[int]) -> Found:
        directory = source.directory
        state = _state_of(directory)
        if state.weights_only:
            check_weights(directory, manifest.read_manifest(directory)["state"], self.config)
            return Found(source, step, state, (), passed_over)
        refused, changes = compare(_settings_of(directory, state), self.settings)
        if refused:
            lines = [f"{change.key}: {change.before} there, {change.after} here" for change in refused]
            raise ValueError(
                f"{directory} is of another run than this configuration says\n  "
                + "\n  ".join(lines)
                + "\nrestore these values, or choose another run_dir and start it from an export "
                "(docs/surviving.md lists what may change)"
            )
        if self.config.train.steps < step:
            raise ValueError(
                f"train.steps={self.config.train.steps} is below step {step}, where the run stands "
                f"({directory}): raise it, or move the later checkpoints away to go back to an earlier one"
            )
        return Found(source, step, state, tuple(changes), passed_over)


def _state_of(directory: Path) -> State:
    stored = manifest.read_manifest(directory).get("state")
    return parse(State, stored, origin=f"{directory / manifest.MANIFEST}: state")


def _settings_of(directory: Path, state: State) -> RunSettings:
    """The settings of a checkpoint. Earlier versions wrote them only into config.yaml."""
    if state.settings is not None:
        return RunSettings(state.settings, state.content)
    try:
        return RunSettings(flatten(load_config(directory / "config.yaml")), {})
    except ConfigError as error:
        raise ValueError(
            f"{directory} was written by an earlier version, whose settings cannot be compared with this "
            f"configuration: {error}\nstart another run from an export of it"
        ) from error


def change_lines(step: int, changes: tuple[Change, ...]) -> list[str]:
    """The lines of a table of the settings that have changed since the checkpoint of `step`."""
    width = [max(len(getattr(change, name)) for change in changes) for name in ("key", "before")]
    return [
        f"changed since the checkpoint of step {step}, and applied from here on:",
        *(f"  {c.key:<{width[0]}}  {c.before:>{width[1]}} -> {c.after}" for c in changes),
    ]
