"""Where a run's metrics are shown: TensorBoard, and if configured Weights & Biases and MLflow.

A run is one run in each of them, over all its incarnations. TensorBoard hides the steps that a run repeats
after a restart. The other two cannot take back what they have. There each step keeps its first values, which
a resumed run computes again bit by bit, except after a rollback.
"""

import json
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from torch.utils.tensorboard import SummaryWriter

from megatron_post.config.schema import Config
from megatron_post.config.settings import flatten
from megatron_post.config.tracking import MLflow, WandB
from megatron_post.installation import Extra, install_command
from megatron_post.storage.files import write_durably
from megatron_post.storage.reading import read_object

_IDS = "tracking.json"


class Tracker(Protocol):
    """Shows the metrics of one run on one rank. Its errors turn it off, and do not end the run."""

    name: str

    def begin(self, *, after: int, written: Mapping[str, int]) -> None:
        """Continue after step `after`. written: the last step that an earlier incarnation wrote, by kind."""

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Show the values of a step. kind: "train" or "eval"."""

    def close(self) -> None: ...


def missing_trackers(config: Config) -> list[str]:
    """Reasons why a configured tracker cannot be used here. Empty if there are none."""
    wanted: dict[Extra, object] = {"wandb": config.tracking.wandb, "mlflow": config.tracking.mlflow}
    return [
        f"tracking.{name} needs a package that is not installed; {install_command(name)}"
        for name, settings in wanted.items()
        if settings is not None and find_spec(name) is None
    ]


def make_trackers(config: Config) -> list[Tracker]:
    """The trackers of a run."""
    directory, tracking = Path(config.run_dir), config.tracking
    trackers: list[Tracker] = [TensorBoard(directory)]
    if tracking.wandb is not None:
        trackers.append(_WeightsAndBiases(directory, tracking.wandb, config))
    if tracking.mlflow is not None:
        trackers.append(_MLflow(directory, tracking.mlflow, config))
    return trackers


class TensorBoard:
    """Event files in `tensorboard` of a run's directory."""

    name = "TensorBoard"

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "tensorboard"
        self._board: SummaryWriter | None = None

    def begin(self, *, after: int, written: Mapping[str, int]) -> None:
        self.close()
        self._board = SummaryWriter(str(self._directory), purge_step=after + 1)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class _New:
    """Which steps are new to a tracker that cannot take back what it has."""

    def __init__(self) -> None:
        self._written: dict[str, int] = {}

    def begin(self, written: Mapping[str, int]) -> None:
        for kind, step in written.items():
            self._written[kind] = max(step, self._written.get(kind, 0))

    def __call__(self, kind: str, step: int) -> bool:
        return step > self._written.get(kind, 0)


class _WeightsAndBiases:
    """https://docs.wandb.ai/guides/track. With `offline`, `wandb sync RUN_DIR/wandb/offline-*` uploads it."""

    name = "Weights & Biases"

    def __init__(self, directory: Path, settings: WandB, config: Config) -> None:
        self._directory, self._settings, self._config = directory, settings, config
        self._is_new, self._run = _New(), None

    def begin(self, *, after: int, written: Mapping[str, int]) -> None:
        self._is_new.begin(written)
        if self._run is not None:
            return
        wandb: Any = import_module("wandb")
        found, kept = _ids(self._directory), self._settings
        identity = found.get("wandb") or uuid4().hex[:8]
        _keep_ids(self._directory, found | {"wandb": identity})
        self._run = wandb.init(
            project=kept.project,
            entity=kept.entity,
            name=kept.name or self._directory.name,
            tags=list(kept.tags),
            id=identity,
            resume="allow",
            mode=kept.mode,
            dir=str(self._directory),
            config=self._config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if self._run is not None and self._is_new(kind, step):
            self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class _MLflow:
    """https://mlflow.org/docs/latest/tracking, through its client, in a directory or on a server."""

    name = "MLflow"

    def __init__(self, directory: Path, settings: MLflow, config: Config) -> None:
        self._directory, self._settings, self._config = directory, settings, config
        self._is_new, self._client, self._run = _New(), None, ""

    def begin(self, *, after: int, written: Mapping[str, int]) -> None:
        self._is_new.begin(written)
        if self._client is not None:
            return
        client = import_module("mlflow.tracking").MlflowClient(self._settings.uri)
        found = _ids(self._directory)
        self._run = found.get("mlflow", "")
        if not self._run:
            name = self._settings.experiment
            experiment = client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else client.create_experiment(name)
            run = client.create_run(number, run_name=self._settings.name or self._directory.name)
            self._run = run.info.run_id
            _keep_ids(self._directory, found | {"mlflow": self._run})
            # A value of a parameter may have 6,000 characters.
            for key, value in flatten(self._config).items():
                client.log_param(self._run, key, str(value)[:6000])
        client.update_run(self._run, status="RUNNING")
        self._client = client

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if self._client is None or not self._is_new(kind, step):
            return
        metric, now = import_module("mlflow.entities").Metric, int(time.time() * 1000)
        metrics = [metric(f"{kind}/{name}", float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        if self._client is not None:
            self._client.update_run(self._run, status="FINISHED")
            self._client = None


def _ids(directory: Path) -> dict[str, str]:
    path = directory / _IDS
    found = read_object(path, "the names of a run in trackers") if path.exists() else {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _keep_ids(directory: Path, ids: dict[str, str]) -> None:
    write_durably(directory / _IDS, json.dumps(ids))
