"""Damaged, truncated, incomplete and malicious checkpoints, and full disks."""

import json
import os
import pickle
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_post.convert.metadata_file import read_metadata
from megatron_post.storage import manifest
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.manifest import DamagedCheckpoint
from tests.e2e.poison import entries, replace_entry, saved
from tests.faults.conftest import FIGURES, STEPS, Run

# Each byte of files up to EVERY_BYTE is flipped, and every STRIDE-th byte of larger ones.
EVERY_BYTE, STRIDE = 64 * 1024, 401


@pytest.fixture
def finished(prepared: Run, tmp_path: Path) -> Run:
    """A finished run with checkpoints of the last step and of the step two before it."""
    subprocess.run(["cp", "-r", prepared.config.parent / "whole", tmp_path / "run"], check=True)
    return Run(prepared.config, tmp_path / "run", prepared.expected, prepared.losses)


def _newest(run: Run) -> Path:
    return manifest.step_directory(run.root, STEPS)


def _falls_back(run: Run, named: str) -> None:
    again = run.start()
    assert again.wait() == [0, 0], again.output
    assert f"step {STEPS} is damaged and passed over" in again.output and named in again.output
    assert again.resumed == STEPS - 2
    run.check_end()
    manifest.verify_step(_newest(run))


def test_flipped_bytes_are_refused(whole_set: None, finished: Run) -> None:
    """One bit is flipped in single bytes of a real checkpoint on the disk, one byte at a time."""
    directory, tried, began = _newest(finished), 0, time.monotonic()
    files = manifest.read_manifest(directory)["files"]
    for name, entry in files.items():
        path = directory / name
        content = path.read_bytes()
        with path.open("r+b", buffering=0) as file:
            for position in range(0, len(content), 1 if len(content) <= EVERY_BYTE else STRIDE):
                os.pwrite(file.fileno(), bytes([content[position] ^ 1 << position % 8]), position)
                with pytest.raises(DamagedCheckpoint, match="content differs"):
                    manifest.check_file(directory, name, entry, content=True)
                os.pwrite(file.fileno(), content[position : position + 1], position)
                tried += 1
    path = directory / manifest.MANIFEST
    content, read = path.read_bytes(), manifest.read_manifest(directory)
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:
            assert manifest.read_manifest(directory) == read  # white space
        except DamagedCheckpoint:
            tried += 1
    path.write_bytes(content)
    manifest.verify_step(directory)
    FIGURES.append(
        f"flipped bytes: {tried} tried, {tried} refused (all of files up to {EVERY_BYTE // 1024} KiB, every "
        f"{STRIDE}st of larger ones; {time.monotonic() - began:.0f} s)"
    )


def test_a_run_falls_back_from_each_damage(whole_set: None, finished: Run) -> None:
    """The damages are a flipped bit in each file in turn, a truncation, a zeroed page and a missing file."""
    names = [manifest.MANIFEST, *sorted(manifest.read_manifest(_newest(finished))["files"])]
    draw = random.Random(1)
    for name in names:
        path = _newest(finished) / name
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        _falls_back(finished, name)
    path = _newest(finished) / "__1_0.distcp"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    _falls_back(finished, path.name)
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(bytes(4096))
    _falls_back(finished, path.name)
    path.unlink()
    _falls_back(finished, path.name)
    tried = len(names) + 3
    FIGURES.append(f"damaged checkpoints: {tried} tried, {tried} runs fell back one checkpoint")


POISONS = [
    "pickle in .metadata",
    "pickle in common.pt",
    "pickle beside tensors",
    "path outside",
    "half there",
]


class _Payload:
    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> object:
        return os.system, (f"touch {self._witness}",)


def _sign(directory: Path) -> None:
    """Write a manifest that fits the files, as an attacker could."""
    content = manifest.read_manifest(directory)
    content["files"] = manifest.checksums(directory, sorted(content["files"]))
    (directory / manifest.MANIFEST).write_text(json.dumps({"sha256": sha256_of_json(content), **content}))


@pytest.mark.parametrize("poison", POISONS)
def test_a_malicious_checkpoint_executes_nothing(whole_set: None, finished: Run, poison: str) -> None:
    directory, witness = _newest(finished), finished.directory / "witness"
    named = ".metadata"
    if poison == "pickle in .metadata":
        (directory / named).write_bytes(pickle.dumps(_Payload(witness)))
    elif poison == "pickle in common.pt":
        torch.save({"optimizer": _Payload(witness)}, directory / "common.pt")
        named = "common.pt"
    elif poison == "pickle beside tensors":
        beside = next(index for index, is_object in entries(directory).items() if is_object)
        replace_entry(directory, beside, saved([_Payload(witness)]))
        named = beside.fqn
    elif poison == "path outside":
        metadata = read_metadata(directory / named)
        index = next(iter(metadata.storage_data))
        assert isinstance(index, MetadataIndex)
        outside = f"../step-{STEPS - 2:08d}/__0_0.distcp"
        metadata.storage_data[index] = _StorageInfo(outside, 0, 10)
        (directory / named).write_bytes(pickle.dumps(metadata))
    else:
        (directory / named).unlink()
    if poison != "half there":
        _sign(directory)
    _falls_back(finished, named)
    assert not witness.exists()
    FIGURES.append(f"poisoned checkpoint ({poison}): nothing run or read outside, fell back")


@pytest.fixture
def small_disk(run: Run) -> Iterator[Path]:
    """A tmpfs for the checkpoints, with room for one and a half of them."""
    run.root.mkdir(parents=True)
    size = sum(path.stat().st_size for path in (run.config.parent / "whole/checkpoints").glob("*4/*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(run.root)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("A FULL DISK NEEDS ROOT, WHICH MAY MOUNT A SMALL TMPFS")
    yield run.root
    subprocess.run(["umount", "--lazy", str(run.root)], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_disk_full_during_a_save(whole_set: None, run: Run, small_disk: Path, asynchronous: bool) -> None:
    setting = f"checkpoint.asynchronous={asynchronous}"
    first = run.start(setting)
    assert first.wait() == [2, 2], first.output
    assert "a checkpoint could not be saved" in first.output and "No space left on device" in first.output
    assert run.published == [2]
    manifest.verify_step(manifest.step_directory(run.root, 2))
    subprocess.run(["mount", "-o", "remount,size=1g", str(small_disk)], check=True)
    second = run.start(setting)
    assert second.wait() == [0, 0], second.output
    assert second.resumed == 2
    run.check_end()
    FIGURES.append(f"disk full (asynchronous={asynchronous}): named, old checkpoint intact, run resumed")
