"""A checkpoint is complete or invisible, and a damaged one is recognized."""

import errno
import hashlib
import os
import pickle
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from torch.distributed.checkpoint.metadata import Metadata

from megatron_post.storage import manifest


def _publish(root: Path, step: int, *, keep: int = 2, keep_every: int = 0) -> Path:
    partial = manifest.partial_directory(root, step)
    partial.mkdir(parents=True)
    (partial / "weights").write_bytes(bytes(range(64)))
    (partial / "state").write_text(f"step {step}")
    with (partial / ".metadata").open("wb") as file:
        pickle.dump(Metadata({}, storage_data={}), file)
    files = manifest.checksums(partial, sorted(p.name for p in partial.iterdir()))
    return manifest.publish(root, step, files=files, state={"seed": 1}, keep=keep, keep_every=keep_every)


def test_a_published_checkpoint_is_complete(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        directory = _publish(tmp_path, step)
        manifest.verify_step(directory)
    assert manifest.published_steps(tmp_path) == [20, 30]
    assert (tmp_path / "latest").read_text() == "step-00000030\n"
    assert manifest.read_manifest(directory)["state"] == {"seed": 1}


def test_an_interrupted_removal_leaves_no_visible_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process dies while it deletes an old checkpoint.

    The rest is invisible, and the next start removes it.
    """

    def die(path: Path, **_: object) -> None:
        if path.name.startswith(".stale"):
            raise KeyboardInterrupt

    _publish(tmp_path, 10, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            _publish(tmp_path, 20, keep=1)
    assert manifest.published_steps(tmp_path) == [20]
    manifest.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000020"]


def test_multiples_of_keep_every_stay_and_newer_steps_do_not_count(tmp_path: Path) -> None:
    """A newer step must be damaged, since the run did not resume from it.

    It must not displace an older one.
    """
    for step in (10, 20, 30, 40):
        _publish(tmp_path, step, keep=1, keep_every=20)
    assert manifest.published_steps(tmp_path) == [20, 40]
    _publish(tmp_path, 30, keep=1)
    assert manifest.published_steps(tmp_path) == [30, 40]


def test_a_partial_directory_is_invisible(tmp_path: Path) -> None:
    manifest.partial_directory(tmp_path, 5).mkdir(parents=True)
    assert manifest.published_steps(tmp_path) == []


def test_every_flipped_byte_is_detected(tmp_path: Path) -> None:
    """A bit is flipped in each byte of each file: the manifest, the metadata and the data."""
    directory = _publish(tmp_path, 1)
    read = manifest.read_manifest(directory)
    for path in sorted(directory.iterdir()):
        good = path.read_bytes()
        for i in range(len(good)):
            path.write_bytes(good[:i] + bytes([good[i] ^ 0x40]) + good[i + 1 :])
            if path.name == manifest.MANIFEST and chr(good[i]).isspace() and _reads_as(directory, read):
                continue  # white space in JSON has no meaning
            with pytest.raises(manifest.DamagedCheckpoint, match=str(directory)):
                manifest.verify_step(directory)
        path.write_bytes(good)
    manifest.verify_step(directory)


def _reads_as(directory: Path, read: dict) -> bool:
    try:
        return manifest.read_manifest(directory) == read
    except manifest.DamagedCheckpoint:
        return False


@pytest.mark.parametrize("damage", ["truncate", "remove", "zero"])
def test_missing_short_and_overwritten_files_are_detected(tmp_path: Path, damage: str) -> None:
    directory = _publish(tmp_path, 1)
    file = directory / "weights"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(bytes(64) if damage == "zero" else file.read_bytes()[:-1])
    with pytest.raises(manifest.DamagedCheckpoint, match="weights"):
        manifest.verify_step(directory)


STRAYS = [
    "step-abc",
    "step-8",
    "step-000000008",
    "step-00000008.bak",
    "step-",
    "step-²",
    "step-０００００００８",
    "old",
]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("sha256", hashlib.sha256(b"weights").hexdigest()),  # of runs before BLAKE3
        ("crc32", zlib.crc32(b"weights")),
        ("blake3", blake3(b"weights").hexdigest()),
    ],
)
def test_checksums_of_every_kind_are_compared(tmp_path: Path, kind: str, value: object) -> None:
    (tmp_path / "file").write_bytes(b"weights")
    entry = {"bytes": 7, kind: value}
    manifest.check_file(tmp_path, "file", entry, content=True)
    (tmp_path / "file").write_bytes(b"WEIGHTS")
    with pytest.raises(manifest.DamagedCheckpoint, match="differs from the manifest's checksum"):
        manifest.check_file(tmp_path, "file", entry, content=True)


def test_a_file_without_a_known_checksum_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"weights")
    with pytest.raises(manifest.DamagedCheckpoint, match="no checksum of a kind"):
        manifest.check_file(tmp_path, "file", {"bytes": 7, "xxh3": "0"}, content=True)


def test_other_entries_are_not_steps(tmp_path: Path) -> None:
    """They are directories with other names, a file with a step's name, and broken or circular links."""
    _publish(tmp_path, 10)
    for name in STRAYS:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").write_text("no directory")
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / "step-00000012").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step-00000013").symlink_to(tmp_path / "step-00000013")
    manifest.partial_directory(tmp_path, 11, epoch=3, attempt=1).mkdir()
    (tmp_path / ".partial-step-7-epoch-x-1").mkdir()
    assert manifest.published_steps(tmp_path) == [10]
    others = [".DS_Store", "step-00000009", "step-00000012", "step-00000013"]
    assert manifest.stray_names(tmp_path) == sorted(STRAYS + others)
    partial = manifest.partial_directory(tmp_path, 11, epoch=3, attempt=1)
    assert manifest.partial_directories(tmp_path, before_epoch=4) == [partial]
    assert manifest.published_steps(tmp_path / "step-00000009") == []
    assert manifest.published_steps(tmp_path / "nowhere") == manifest.stray_names(tmp_path / "nowhere") == []
    _publish(tmp_path, 9, keep=1)  # a file has this name
    assert manifest.published_steps(tmp_path) == [9, 10]


def test_a_link_to_a_checkpoint_counts_as_one(tmp_path: Path) -> None:
    """When the link is removed, the checkpoint itself stays."""
    elsewhere = _publish(tmp_path / "elsewhere", 10)
    root = tmp_path / "here"
    root.mkdir()
    manifest.step_directory(root, 10).symlink_to(elsewhere)
    assert manifest.published_steps(root) == [10]
    _publish(root, 20, keep=1)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000020"]
    manifest.verify_step(elsewhere)


@pytest.mark.parametrize("call", ["unlink", "rename"])
def test_an_old_checkpoint_that_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    """Step 10 has an immutable file or directory.

    The next steps are published nevertheless. A warning says that step 10 keeps its disk space, and every
    save tries again to delete it.
    """
    _publish(tmp_path, 10, keep=1)
    real = getattr(os, call)

    def refuse(path: Any, *rest: Any, **options: Any) -> None:
        if str(path) in ("weights", str(tmp_path / "step-00000010")):
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        real(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        for step in (20, 30):
            manifest.verify_step(_publish(tmp_path, step, keep=1))
            output = capsys.readouterr().out
            warning = r"step-00000010\S* cannot be deleted: \S+: Operation not permitted. It keeps"
            assert re.search(warning, output)
    left = ["step-00000010"] if call == "rename" else []
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [*left, "step-00000030"]
    _publish(tmp_path, 40, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000040"]
    assert capsys.readouterr().out == ""
