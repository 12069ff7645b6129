"""The epoch fence: only the newest incarnation of a run may publish a checkpoint.

Every start of a run is an incarnation. It claims the run's directory with the next epoch number, by creating
a file that only one process can create. An older incarnation may still run, for example because it was
suspended or because its node lost the network. It checks the epochs before it publishes and finds a higher
number.

It may also be suspended between that check and the rename that publishes. For this case a claim deletes the
unfinished files of older epochs, so that the older incarnation's rename fails.
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
    """A newer incarnation has claimed the run. This one may no longer publish."""


@dataclass(frozen=True)
class Fence:
    """One incarnation's claim to a run.

    directory: holds the claims. epoch: number of this claim, from 1. run: an id that all incarnations of this
    run share and no other run has.
    """

    directory: Path
    epoch: int
    incarnation: str
    run: str

    @property
    def is_current(self) -> bool:
        """Whether this incarnation is still the newest one."""
        try:
            self.check()
        except Superseded:
            return False
        return True

    def check(self) -> None:
        """Raises `Superseded` if another incarnation has claimed the run since."""
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


def _incarnation_from_environment() -> str:
    """MEGATRON_POST_INCARNATION, which a launcher sets for all ranks, or else a name from host and time."""
    fresh = f"{socket.gethostname()}-{time.time_ns()}"
    return os.environ.get("MEGATRON_POST_INCARNATION") or fresh


def claim(run_dir: str | Path, incarnation: str) -> Fence:
    """Claim a run with the next epoch, and delete the unfinished files of older epochs. One rank calls it.

    Raises `Superseded` if this incarnation has been superseded before and is started again, and `OSError` if
    the run's directories cannot be created.
    """
    directory = Path(run_dir) / "incarnations"
    directory.mkdir(parents=True, exist_ok=True)
    # If the directory cannot be created, this fails now and not at the first save.
    (Path(run_dir) / "checkpoints").mkdir(exist_ok=True)
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
    """Claim a run on rank 0 and send the claim to all ranks.

    Raises `Superseded` or `OSError` on all ranks.
    """
    outcome: list[Any] = [None]
    if topology.rank == 0:
        try:
            outcome = [claim(run_dir, _incarnation_from_environment())]
        except (Superseded, OSError) as error:
            outcome = [error]
    torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    fence: Fence = outcome[0]
    return fence


def _create_next(directory: Path, incarnation: str, root: Path) -> tuple[int, str]:
    """Create the claim of the next epoch. Returns the epoch and the id of the run."""
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
            # Checkpoints were copied into an empty run directory. They keep the id of their run.
            content["run"] = _run_of_checkpoints(root) or content["run"]
        # Mode "x" fails if the file exists. Of two starts at the same moment, one gets the next number.
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
    """The id of the run that published the checkpoints, or None if no checkpoint names a run.

    The checkpoint that `latest` names is read first, then the newest ones. A user who copies one step of
    another run into the directory does not change `latest`.
    """
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
    """The content of a claim. It is empty if the process died while it wrote the file."""
    try:
        content: dict[str, Any] = json.loads((directory / f"{epoch:06d}").read_text())
    except (OSError, ValueError):
        return {}
    return content
