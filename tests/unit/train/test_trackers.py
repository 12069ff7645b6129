"""A run of several incarnations is one run in each tracker, and has each step once."""

import json
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_post.train import trackers
from megatron_post.train.metrics import MetricsWriter
from megatron_post.train.trackers import make_trackers, missing_trackers
from tests.tiny import tiny_config

# Killed before the first checkpoint, then after step 5 with a checkpoint of step 3.
INCARNATIONS = ((0, (1, 2)), (0, (1, 2, 3, 4, 5)), (3, (4, 5, 6, 7)))


def _report(run_dir: Path, tracking: dict[str, Any]) -> None:
    config = tiny_config(run_dir, tracking=tracking)
    for after, steps in INCARNATIONS:
        writer = MetricsWriter(run_dir, active=True, trackers=make_trackers(config))
        writer.begin(after=after)
        for step in steps:
            writer.write("train", step, {"loss": 1 / step})
            if step % 2 == 0:
                writer.write("eval", step, {"loss": 2 / step})
        writer.close()
        if "wandb" in sys.modules:  # its own process would otherwise serve all incarnations
            sys.modules["wandb"].teardown()


def _records(path: Path) -> Iterator[bytes]:
    """Records of W&B's file, which has the format of LevelDB's log after seven bytes of its own."""
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # a header never crosses a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield record
            record = b""


def test_weights_and_biases_offline(tmp_path: Path) -> None:
    wandb_pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    _report(tmp_path / "run", {"wandb": {"project": "p", "mode": "offline", "tags": ["t"]}})
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    (identity,) = {file.stem.removeprefix("run-") for file in files}
    assert (
        len(files) == 3 and json.loads((tmp_path / "run" / "tracking.json").read_text())["wandb"] == identity
    )
    found: Counter[tuple[int, str, float]] = Counter()
    for file in files:
        for content in _records(file):
            record = wandb_pb.Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): item.value_json for item in record.history.item
                }
                names = [name for name in items if not name.startswith("_")]
                found.update((record.history.step.num, n, json.loads(items[n])) for n in names)
    expected = [(step, "train/loss", 1 / step) for step in range(1, 8)]
    expected += [(step, "eval/loss", 2 / step) for step in (2, 4, 6)]
    assert found == Counter(expected)


def test_mlflow_with_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the small package has no database
    uri = (tmp_path / "mlruns").as_uri()
    _report(tmp_path / "run", {"mlflow": {"uri": uri, "experiment": "e"}})
    client = tracking.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["optimizer.lr"] and run.data.params["tracking.mlflow.experiment"] == "e"
    steps = [
        (metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")
    ]
    assert sorted(steps) == [(step, 1 / step) for step in range(1, 8)]
    evaluations = client.get_metric_history(run.info.run_id, "eval/loss")
    assert sorted(metric.step for metric in evaluations) == [2, 4, 6]


def test_a_tracker_that_fails_is_turned_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        name = "Broken"
        calls = 0

        def begin(self, **_: object) -> None: ...

        def write(self, *_: object) -> None:
            self.calls += 1
            raise RuntimeError("no network")

        def close(self) -> None:
            raise AssertionError("it has been turned off")

    broken = Broken()
    writer = MetricsWriter(tmp_path, active=True, trackers=[broken])
    writer.begin(after=0)
    for step in (1, 2):
        writer.write("train", step, {"loss": 0.5})
    writer.close()
    assert broken.calls == 1 and capsys.readouterr().out.count("Broken lacks what follows: no network") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    wanted = {"wandb": {"project": "p"}, "mlflow": {"uri": "sqlite:///x", "experiment": "e"}}
    config = tiny_config(tmp_path, tracking=wanted)
    assert [text.partition(" ")[0] for text in missing_trackers(config)] == [
        "tracking.wandb",
        "tracking.mlflow",
    ]
