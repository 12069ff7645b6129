"""The epoch fence: of all incarnations of a run, only the newest may publish a checkpoint.

Every start of a run claims its directory with the next epoch number, in a file that only one process can
create. An older incarnation that still runs, such as one that was stopped, cut off or outlived its node's
daemon, finds a higher number before it publishes. Between that look and the rename it may be stopped once
more; therefore a claim also takes away what older epochs were writing, and a rename of something that is gone
fails.
"""

import contextlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_post.display import say
from megatron_post.parallel.topology import Topology
from megatron_post.storage import manifest

_EPOCH = re.compile(r"\d{6,}", re.ASCII)


class Superseded(ValueError):
    """A newer incarnation has claimed the run; this one may not publish any more."""


@dataclass(frozen=True)
class Fence:
    """One incarnation's claim to a run. directory: where claims are; epoch: its number, from 1; run: an id
    that all incarnations of the run share, and no other run has."""

    directory: Path
    epoch: int
    incarnation: str
    run: str

    @property
    def stands(self) -> bool:
        """Whether no other incarnation has claimed the run since."""
        try:
            self.check()
        except Superseded:
            return False
        return True

    def check(self) -> None:
        """Raises `Superseded` where another incarnation has claimed the run since."""
        epochs = _epochs(self.directory) if self.directory.is_dir() else []
        if self.epoch not in epochs:
            raise Superseded(
                f"incarnation {self.incarnation} may not publish: its claim "
                f"{self.directory}/{self.epoch:06d} was removed"
            )
        newest = epochs[-1]
        if newest != self.epoch:
            owner = _read(self.directory, newest)
            raise Superseded(
                f"incarnation {self.incarnation} (epoch {self.epoch}) may not publish: the run belongs to "
                f"incarnation {owner.get('incarnation')} on {owner.get('host')} (epoch {newest}) by now"
            )


def incarnation_from_environment() -> str:
    """MEGATRON_POST_INCARNATION, which a launcher sets alike on all ranks; else one of this time and host."""
    fresh = f"{socket.gethostname()}-{time.time_ns()}"
    return os.environ.get("MEGATRON_POST_INCARNATION") or fresh


def claim(run_dir: str | Path, incarnation: str) -> Fence:
    """Take over a run: the next epoch, and what older epochs were writing removed. One rank calls it.

    Raises `Superseded` for an incarnation that has been superseded already and is started again, and
    `OSError` where the run's directories cannot be made.
    """
    directory = Path(run_dir) / "incarnations"
    directory.mkdir(parents=True, exist_ok=True)
    (Path(run_dir) / "checkpoints").mkdir(exist_ok=True)  # or else the first save would find out
    epochs = _epochs(directory)
    if any(_read(directory, epoch).get("incarnation") == incarnation for epoch in epochs[:-1]):
        latest = _read(directory, epochs[-1]).get("incarnation")
        if latest != incarnation:
            raise Superseded(f"incarnation {incarnation} was superseded by {latest} and cannot start again")
    root = Path(run_dir) / "checkpoints"
    epoch, run = _create_next(directory, incarnation, root)
    for partial in manifest.partial_directories(root, before_epoch=epoch):
        manifest.remove(partial)
    manifest.remove_leftovers(root)
    if strays := manifest.stray_names(root):
        say(f"{root}: passed over, for these are no checkpoints: {', '.join(map(repr, strays))}")
    return Fence(directory, epoch, incarnation, run)


def claim_together(run_dir: str | Path, topology: Topology) -> Fence:
    """All ranks of an incarnation take over a run. Raises `Superseded` on all of them."""
    told: list[Any] = [None]
    if topology.rank == 0:
        try:
            told = [claim(run_dir, incarnation_from_environment())]
        except (Superseded, OSError) as error:
            told = [error]
    torch.distributed.broadcast_object_list(told, src=0)
    if isinstance(told[0], Exception):
        raise told[0]
    fence: Fence = told[0]
    return fence


def _create_next(directory: Path, incarnation: str, root: Path) -> tuple[int, str]:
    """The next epoch, and the id of the run."""
    content: dict[str, Any] = {
        "incarnation": incarnation,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
    }
    while True:
        epochs = _epochs(directory)
        epoch = max(epochs, default=0) + 1
        content["run"] = _run_of_claims(directory, epochs) or uuid.uuid4().hex[:16]
        if not epochs:
            # the checkpoints of another run were brought here, and that run goes on from them
            content["run"] = _run_of_checkpoints(root) or content["run"]
        with contextlib.suppress(FileExistsError), (directory / f"{epoch:06d}").open("x") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
            break
    manifest.sync_directory(directory)
    return epoch, content["run"]


def _run_of_claims(directory: Path, epochs: Sequence[int]) -> str | None:
    found = (_read(directory, epoch).get("run") for epoch in reversed(epochs))
    return next((run for run in found if isinstance(run, str)), None)


def _run_of_checkpoints(root: Path) -> str | None:
    """The run that has published the newest checkpoint which names one. The one that `latest` names comes
    first: who copies a step does not move it."""
    steps = [manifest.step_directory(root, step) for step in reversed(manifest.published_steps(root))]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        latest = (root / manifest.LATEST).read_text().strip()
        steps.sort(key=lambda step: step.name != latest)
    for step in steps:
        with contextlib.suppress(manifest.DamagedCheckpoint, KeyError, AttributeError):
            run = manifest.read_manifest(step)["state"].get("run")
            if isinstance(run, str):
                return run
    return None


def _epochs(directory: Path) -> list[int]:
    names = (path.name for path in directory.iterdir())
    return sorted(int(name) for name in names if _EPOCH.fullmatch(name) and name == f"{int(name):06d}")


def _read(directory: Path, epoch: int) -> dict[str, Any]:
    """Who claimed an epoch; nothing where its process died while it wrote that down."""
    try:
        content: dict[str, Any] = json.loads((directory / f"{epoch:06d}").read_text())
    except (OSError, ValueError):
        return {}
    return content
