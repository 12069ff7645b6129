"""Conversions that are interrupted, that share the work, and that lack disk space."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_post.convert.jobs import ConversionError, convert, worker_environment
from megatron_post.convert.part_file import PartFile
from megatron_post.convert.to_hf import ToHuggingFace
from megatron_post.convert.to_megatron import ToMegatron
from megatron_post.convert.verify import compare_models
from tests.unit.convert.models import shaped_like, to_hf, to_megatron, weights_of, write_hf

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = shaped_like("8b")
    return write_hf(tmp_path / "hf", model, weights_of(model))


def _job(source: Path, root: Path) -> ToMegatron:
    return ToMegatron(str(source), str(root), None, part_bytes=100_000, chunk_bytes=10_000)


class _Stop(Exception):
    pass


def _stop_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Make the conversion fail inside part `count` (from 0), after some of its bytes have been written."""
    original, parts = ToMegatron.write_part, []

    def write_part(self: ToMegatron, number: int, file: object) -> object:
        parts.append(number)
        if len(parts) > count:
            file.write(b"half a part")  # type: ignore[attr-defined]
            raise error
        return original(self, number, file)

    monkeypatch.setattr(ToMegatron, "write_part", write_part)


@pytest.mark.parametrize("parts_before", [0, 2])
def test_interrupted_conversion_resumes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, parts_before: int
) -> None:
    """The target is absent until all parts are complete. Complete parts are not written again."""
    root = tmp_path / "checkpoints"
    _stop_after(monkeypatch, parts_before, _Stop())
    with pytest.raises(_Stop):
        convert(_job(source, root), workers=1, report=print)
    monkeypatch.undo()
    assert not (root / "step-00000000").exists() and not (root / "latest").exists()
    kept = {file.name: file.stat().st_ino for file in (root / ".partial-step-00000000").iterdir()}
    assert len(kept) == parts_before
    reported: list[str] = []
    assert convert(_job(source, root), workers=1, report=reported.append).is_complete
    assert any(f"{parts_before} of" in line for line in reported) == (parts_before > 0)
    step = root / "step-00000000"
    assert all((step / name).stat().st_ino == inode for name, inode in kept.items())
    compare_models(str(source), str(root), report=print)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000000"]


@pytest.mark.slow
def test_killed_process_resumes(tmp_path: Path) -> None:
    """A process is killed while it writes. The same command then ends with the same files."""
    model = shaped_like("405b")
    source = write_hf(tmp_path / "hf", model, weights_of(model))
    expected = to_megatron(source, tmp_path / "whole")
    root = tmp_path / "killed"
    code = (
        "from tests.unit.convert.models import *; import sys\n"
        "to_megatron(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(root)], cwd=ROOT, env=env)
    deadline = time.monotonic() + 120
    while not list(root.glob(".partial-*/__3_0.distcp")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (root / "step-00000000").exists()
    to_megatron(source, root)
    parts = sorted(path.name for path in (root / "step-00000000").glob("*.distcp"))
    for name in (*parts, ".metadata"):
        resumed, uninterrupted = (path / "step-00000000" / name for path in (root, expected))
        # Files are identical because the serialization id in torch's archives is a hash of their content.
        assert resumed.read_bytes() == uninterrupted.read_bytes(), name


def test_another_source_is_not_mixed_in(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkpoints"
    _stop_after(monkeypatch, 1, _Stop())
    with pytest.raises(_Stop):
        convert(_job(source, root), workers=1, report=print)
    monkeypatch.undo()
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(ConversionError, match=r"unfinished conversion with another source.*remove"):
        convert(_job(source, root), workers=1, report=print)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """The error says what is kept, the source is unchanged, and with space the same command completes."""
    before = {file: file.read_bytes() for file in source.iterdir()}
    root = tmp_path / "checkpoints"
    _stop_after(monkeypatch, 2, OSError(code, os.strerror(code)))
    with pytest.raises(ConversionError, match=rf"{os.strerror(code)}; .* 2 of \d parts are kept"):
        convert(_job(source, root), workers=1, report=print)
    monkeypatch.undo()
    assert {file: file.read_bytes() for file in source.iterdir()} == before
    assert not (root / "step-00000000").exists()
    assert convert(_job(source, root), workers=1, report=print).is_complete


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOTDIR])
def test_other_errors_of_the_disk(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The error is one line with the file, as for anything that a user can mend."""

    def refuse(self: Path, *args: object, **settings: object) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        ConversionError, match=rf"c/.converting-step-00000000: {os.strerror(code)}; the source"
    ):
        convert(_job(source, tmp_path / "c"), workers=1, report=print)


def test_two_processes_share_the_parts(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process starts while the first one writes its third part.

    It skips that part and writes all others. The first process finds them complete, and publishes.
    """
    root, reported, original, first = tmp_path / "checkpoints", [], ToMegatron.write_part, []

    def write_part(self: ToMegatron, number: int, file: PartFile) -> dict[str, Any]:
        first.append(number)
        if len(first) == 3:
            monkeypatch.setattr(ToMegatron, "write_part", original)
            assert not convert(_job(source, root), workers=1, report=reported.append).is_complete
        return original(self, number, file)

    monkeypatch.setattr(ToMegatron, "write_part", write_part)
    assert convert(_job(source, root), workers=1, report=print).is_complete
    assert first == [0, 1, 2]
    assert any(
        line.startswith(f"1 of {len(_job(source, root).parts)} parts are not complete") for line in reported
    )
    compare_models(str(source), str(root), report=print)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000000"]


def test_free_space_is_checked_first(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConversionError, match=r"needs another [\d,]+ bytes and its disk has 1,000 free"):
        convert(_job(source, tmp_path / "checkpoints"), workers=1, report=print)


def test_existing_targets_are_left_alone(tmp_path: Path, source: Path) -> None:
    root = to_megatron(source, tmp_path / "checkpoints")
    with pytest.raises(ConversionError, match="exists already"):
        to_megatron(source, root)
    (root / "step-00000000").rename(root / "step-00000040")
    with pytest.raises(ConversionError, match="has checkpoints of steps 40"):
        _job(source, root).check()
    (tmp_path / "here").mkdir()
    with pytest.raises(ConversionError, match="exists already"):
        to_hf(root, tmp_path / "here")


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, (0, 1)),  # a batch script
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, (5, 8)),
        (_array := {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "9", "SLURM_ARRAY_TASK_COUNT": "5",
                    "SLURM_ARRAY_TASK_ID": "7"}, (3, 5)),
        (_array | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}, (7, 10)),
        (_array | {"SLURM_ARRAY_TASK_MIN": "7", "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_COUNT": "1"},
         (0, 1)),
    ],
)  # fmt: skip
def test_worker_environment(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], expected: tuple[int, int]
) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert worker_environment() == expected


def test_uneven_arrays_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MIN": "0", "MAX": "7", "COUNT": "3", "ID": "7"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    with pytest.raises(ConversionError, match="unevenly spaced"):
        worker_environment()


def test_nodes_share_and_the_last_publishes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three nodes of an array run one after another. Only the last one finds all parts complete.

    A fourth run reports that the target is complete.
    """
    root = tmp_path / "checkpoints"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, complete in ((2, False), (0, False), (1, True), (1, True)):
        monkeypatch.setenv("RANK", str(rank))
        assert (root / "step-00000000").exists() == (rank == 1 and complete and _published(root))
        assert convert(_job(source, root), workers=1, report=print).is_complete == complete
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    compare_models(str(source), str(root), report=print)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        job = ToHuggingFace(str(root), str(tmp_path / "back"), max_shard_bytes=100_000)
        assert convert(job, workers=1, report=print).is_complete == (rank == 1)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights_of(shaped_like("8b")))


def _published(root: Path) -> bool:
    return (root / "step-00000000").exists()
