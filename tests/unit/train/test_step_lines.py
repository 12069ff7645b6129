"""A run's metrics have each step once, and a full disk does not end the run."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from megatron_post.train.fence import claim
from megatron_post.train.metrics import MetricsWriter
from megatron_post.train.step_lines import StepLines
from megatron_post.train.trackers import TensorBoard


@pytest.fixture(autouse=True)
def _first_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one second are read in the order of their numbers as text, where 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def _line(step: int) -> bytes:
    return json.dumps({"kind": "train", "step": step, "loss": 0.5}).encode() + b"\n"


def _lines(*steps: int) -> bytes:
    return b"".join(map(_line, steps))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (_lines(1, 2, 3, 4, 5), _lines(1, 2, 3)),
        (_lines(1, 2), _lines(1, 2)),
        (_lines(4, 5), b""),
        (b"", b""),
        # The run was killed or the disk became full in the middle of a line.
        (_lines(1, 2, 3) + _line(4)[:-9], _lines(1, 2, 3)),
        (_lines(1, 2) + _line(3)[:-1], _lines(1, 2, 3)),
        (_lines(1) + b'{"kind": "tra' + _lines(2, 3), _lines(1, 3)),
        (_lines(1) + b"\x00\x00\xff\n" + b"[" * 100000 + b"\n" + _lines(2, 9), _lines(1, 2)),
        # Several incarnations wrote the file with an earlier version, which did not cut it back.
        (_lines(1, 2, 3, 4) + _lines(3, 4, 5), _lines(1, 2, 3, 3)),
        (b'{"kind": "note"}\n[1]\n' + _lines(9), b'{"kind": "note"}\n[1]\n'),
    ],
)
def test_cut_back_to_a_step(tmp_path: Path, content: bytes, expected: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    lines = StepLines(path)
    lines.cut_back(3)
    assert path.read_bytes() == expected
    lines.write(kind="train", step=4, loss=0.5)
    assert path.read_bytes() == expected + _line(4)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_cutting_back_a_missing_file_does_nothing(tmp_path: Path) -> None:
    StepLines(tmp_path / "metrics.jsonl").cut_back(3)
    assert not list(tmp_path.iterdir())


def _in_a_process(script: str, directory: Path) -> str:
    """The output of a process whose files are limited to 300 bytes until it calls `room()`."""
    limit = """
import resource, sys
from pathlib import Path
directory, hard = Path(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
def room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
"""
    command = [sys.executable, "-c", limit + script, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def test_a_full_disk_leaves_out_whole_lines_and_gives_one_warning(tmp_path: Path) -> None:
    script = """
from megatron_post.train.step_lines import StepLines
lines = StepLines(directory / "metrics.jsonl")
for step in range(1, 21):
    if step == 15:
        room()
    lines.write(kind="train", step=step, loss=0.5)
"""
    output = _in_a_process(script, tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    fitting = 300 // len(_line(1))
    assert steps == [*range(1, fitting + 1), *range(15, 21)]
    assert output.count("\n") == 1
    assert "metrics.jsonl cannot be written" in output and "File too large" in output


def test_a_disk_that_is_full_for_tensorboard_does_not_end_a_run(tmp_path: Path) -> None:
    script = """
import time
from megatron_post.train.metrics import MetricsWriter
from megatron_post.train.trackers import TensorBoard
from pathlib import Path
writer = MetricsWriter(directory, active=True, trackers=[TensorBoard(Path(directory))])
writer.begin(after=0)
for step in range(1, 60):
    writer.write("train", step, {"loss": 0.5, "lr": 0.1})
    time.sleep(0.005)
writer.begin(after=4)
writer.close()
print("the run has ended")
"""
    output = _in_a_process(script, tmp_path)
    assert "TensorBoard lacks what follows" in output and "the run has ended" in output
    assert output.count("metrics.jsonl cannot be written") == 1


def _scalars(directory: Path) -> list[tuple[int, float]]:
    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("train/loss")]


def _report(run_dir: Path, steps: Sequence[int], *, after: int, loss: float) -> None:
    writer = MetricsWriter(run_dir, active=True, trackers=[TensorBoard(run_dir)])
    writer.begin(after=after)
    for step in steps:
        writer.write("train", step, {"loss": loss})
    writer.close()


def test_tensorboard_and_the_lines_have_each_step_once(tmp_path: Path) -> None:
    """The run is killed before its first checkpoint, and again after step 5 with a checkpoint of step 3."""
    _report(tmp_path, [1, 2, 3], after=0, loss=9.0)
    _report(tmp_path, [1, 2, 3, 4, 5], after=0, loss=2.0)
    _report(tmp_path, [4, 5, 6], after=3, loss=1.0)
    expected = [(1, 2.0), (2, 2.0), (3, 2.0), (4, 1.0), (5, 1.0), (6, 1.0)]
    found = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [(line["step"], line["loss"]) for line in found] == expected
    assert _scalars(tmp_path) == expected


def test_a_rollback_cuts_back_too(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, active=True, trackers=[TensorBoard(tmp_path)])
    for after in (0, 2):
        writer.begin(after=after)
        for step in range(after + 1, 5):
            writer.write("train", step, {"loss": float(after)})
    writer.close()
    assert _scalars(tmp_path) == [(1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0)]


def test_a_replaced_process_writes_no_lines(tmp_path: Path) -> None:
    """It was suspended, another incarnation has claimed the run, and it resumes in the middle of a step."""
    old = claim(tmp_path, "1.0")
    lines = StepLines(tmp_path / "metrics.jsonl", may_write=lambda: old.is_current)
    lines.write(kind="train", step=1, loss=0.5)
    claim(tmp_path, "1.1")
    lines.write(kind="train", step=2, loss=0.5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == _line(1)
