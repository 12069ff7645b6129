"""`launch curate`: the array of processes, which take GPUs only if a step uses them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_post.config.load import ConfigError
from megatron_post.launch.curation import launch_curation
from tests.e2e.runs import ROOT

H100 = str(ROOT / "configs" / "clusters" / "h100.yaml")
JUDGE = {"model": "judge", "backend": {"kind": "server", "url": "http://judge:8000/v1", "served_model": "m"}}
TOPICS = str(ROOT / "configs" / "curation" / "topics.yaml")
LENGTHS = {"kind": "lengths", "most_turns": 9}
MARKS = {"kind": "quality", "marks": {"judge": "judge"}}


def _dry_run(
    directory: Path,
    capsys: pytest.CaptureFixture[str],
    *steps: dict[str, Any],
    model: dict[str, Any] | None = None,
    **options: Any,
) -> str:
    values: dict[str, Any] = {
        "run": str(directory / "run"),
        "sources": [{"name": "chat", "path": str(directory / "chat.jsonl")}],
        "steps": list(steps),
    }
    values |= {"models": {"judge": model}} if model else {}
    path = directory / "curation.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    launch_curation(str(path), H100, ("seed=3",), dry_run=True, **options)
    return capsys.readouterr().out


def test_processes_are_an_array_that_takes_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _dry_run(tmp_path, capsys, LENGTHS, MARKS, model=JUDGE, processes=16, cpus=4)
    line = next(line for line in found.splitlines() if line.startswith("# sbatch "))
    assert "--array=0-15" in line and "%A_%a.log" in line and "--cpus-per-task=4" in line
    assert "--gpus-per-node" not in line and "--exclusive" not in line and "--ntasks-per-node=1" in line
    assert f"#   megatron-post curate run {tmp_path}/curation.yaml seed=3" in found
    assert f"command=(curate run {tmp_path}/curation.yaml seed=3)" in found
    assert "processes that share the rows: 16" in found and "each process: no GPU" in found
    assert not (tmp_path / "run").exists()


def test_embedding_takes_every_gpu_of_its_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _dry_run(tmp_path, capsys, {"kind": "semantic_duplicates"}, processes=2)
    line = next(line for line in found.splitlines() if line.startswith("# sbatch "))
    assert "--gpus-per-node=8" in line and "--exclusive" in line and "--ntasks-per-node=1" in line
    assert "each process: a whole node with 8 GPUs, for the step semantic_duplicates" in found


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu:1"]])
def test_embedding_on_the_cpu_takes_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], devices: list[str]
) -> None:
    found = _dry_run(tmp_path, capsys, {"kind": "semantic_duplicates", "devices": devices})
    assert "each process: no GPU" in found and "--gpus-per-node" not in found
    found = _dry_run(tmp_path, capsys, {"kind": "semantic_duplicates", "devices": ["cpu", "cuda:1"]})
    assert "--gpus-per-node=8" in found


_OF_THE_JUDGE = [
    MARKS,
    {"kind": "topics", "taxonomy": TOPICS, "judge": "judge"},
    {"kind": "difficulty", "tags": "judge"},
    {"kind": "difficulty", "rating": "judge"},
]


@pytest.mark.parametrize("backend", [{"kind": "vllm"}, {"kind": "transformers"}])
@pytest.mark.parametrize("step", _OF_THE_JUDGE)
def test_a_model_in_the_process_takes_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: dict[str, Any], backend: dict[str, Any]
) -> None:
    found = _dry_run(tmp_path, capsys, step, model={"model": "m", "backend": backend})
    assert "--gpus-per-node=8" in found and "GPUs, for the model judge" in found


def test_a_classifier_of_topics_takes_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = {"kind": "topics", "taxonomy": TOPICS, "classifier": {"model": str(tmp_path)}}
    found = _dry_run(tmp_path, capsys, step)
    assert "--gpus-per-node=8" in found and "GPUs, for the step topics" in found
    with pytest.raises(ConfigError, match="--cpus has no effect: the step topics uses GPUs"):
        _dry_run(tmp_path, capsys, step, cpus=4)


def test_more_cores_than_a_node_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"--cpus 10000 is more than cpus_per_node="):
        _dry_run(tmp_path, capsys, LENGTHS, cpus=10_000)
    with pytest.raises(ConfigError, match="--cpus has no effect: the step semantic_duplicates uses GPUs"):
        _dry_run(tmp_path, capsys, {"kind": "semantic_duplicates"}, cpus=4)
