"""Checkpoint directories that are either complete or invisible.

A directory is written under another name, gets a JSON manifest with the checksums of its files, and is then
renamed. This module does not depend on the content of the files.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from megatron_post.display import say
from megatron_post.storage.checksums import (
    blake3_of_file,
    crc32_of_file,
    sha256_of_file,
    sha256_of_json,
)
from megatron_post.storage.files import write_durably
from megatron_post.storage.reading import read_object

MANIFEST = "manifest.json"
LATEST = "latest"
_STEP = re.compile(r"step-(\d{8,})", re.ASCII)
_PARTIAL = re.compile(r"\.partial-step-\d+-epoch-(\d+)-\d+", re.ASCII)
# Runs write BLAKE3, conversions CRC-32. Runs of earlier versions wrote SHA-256.
_CHECKSUMS: dict[str, Callable[[Path], str | int]] = {
    "blake3": blake3_of_file,
    "crc32": crc32_of_file,
    "sha256": sha256_of_file,
}
_WORKING = (".partial-step-", ".converting-step-", ".stale-", ".replaced-")


class DamagedCheckpoint(ValueError):
    """A checkpoint that must not be loaded. The message names the file and the fault."""


def step_directory(root: Path, step: int) -> Path:
    """The directory of a published checkpoint."""
    return root / f"step-{step:08d}"


def partial_directory(root: Path, step: int, *, epoch: int = 0, attempt: int = 0) -> Path:
    """The directory in which a checkpoint is written before it is published.

    epoch: number of the incarnation that writes it, see `fence`. attempt: number of this incarnation's save.
    Both are 0 if a conversion writes it and not a run.
    """
    writer = f"-epoch-{epoch}-{attempt}" if epoch else ""
    return root / f".partial-step-{step:08d}{writer}"


def partial_directories(root: Path, *, before_epoch: int) -> list[Path]:
    """The partial directories of incarnations before `before_epoch`."""
    matches = ((path, _PARTIAL.fullmatch(path.name)) for path in _entries(root))
    return [path for path, match in matches if match is not None and int(match[1]) < before_epoch]


def published_steps(root: Path) -> list[int]:
    """Steps with a published directory or a link to one, oldest first.

    They may be damaged, see `verify_step`. Other names in the directory are `stray_names`.
    """
    return sorted(int(path.name.removeprefix("step-")) for path in _entries(root) if _is_step(path))


def stray_names(root: Path) -> list[str]:
    """Names among the checkpoints that no run has written, such as `step-8` or `step-00000008.bak`."""
    own = (*_WORKING, f".{LATEST}", ".nfs")  # .nfs: a deleted file that a process still has open
    names = [path.name for path in _entries(root) if not _is_step(path)]
    return sorted(name for name in names if name != LATEST and not name.startswith(own))


def _is_step(path: Path) -> bool:
    match = _STEP.fullmatch(path.name)
    return match is not None and step_directory(path.parent, int(match[1])) == path and path.is_dir()


def _entries(root: Path) -> list[Path]:
    """The entries of a directory. Empty if there is no such directory."""
    try:
        return list(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def checksums(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and BLAKE3 of files in a directory. Each file is flushed to the disk first."""
    result = {}
    for name in names:
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
        result[name] = {
            "bytes": (directory / name).stat().st_size,
            "blake3": blake3_of_file(directory / name),
        }
    return result


def publish(
    root: Path,
    step: int,
    *,
    files: dict[str, dict[str, Any]],
    state: dict[str, Any],
    keep: int,
    keep_every: int = 0,
    partial: Path | None = None,
    check: Callable[[], None] = lambda: None,
    passed_over: Collection[int] = (),
) -> Path:
    """Write the manifest, rename the partial directory into place, move `latest`, and remove old checkpoints.

    The newest `keep` of the steps up to this one stay, and every multiple of `keep_every`. partial: the
    directory to publish, by default `partial_directory(root, step)`. check: called just before the rename. If
    it raises, nothing is published. passed_over: steps that the run cannot use. They are not removed, and do
    not count as kept.
    """
    partial, final = partial or partial_directory(root, step), step_directory(root, step)
    content = {"step": step, "state": state, "files": files}
    write_durably(partial / MANIFEST, json.dumps({"sha256": sha256_of_json(content), **content}, indent=1))
    # All content must be on the disk before the rename, or a power failure could publish empty files.
    sync_directory(partial)
    check()
    _put_into_place(partial, final)
    write_durably(root / f".{LATEST}", final.name + "\n")
    (root / f".{LATEST}").replace(root / LATEST)
    sync_directory(root)
    # A newer step must be damaged, since the run would otherwise have resumed from it. It does not count as
    # kept, so that it cannot displace an intact one.
    past = [old for old in published_steps(root) if old <= step and old not in passed_over]
    stale = [path for path in _entries(root) if path.name.startswith(".stale-")]
    for old in past[:-keep]:
        if not keep_every or old % keep_every:
            try:
                remove(step_directory(root, old))
            except OSError as error:  # this is no reason to end a run
                _say_not_deleted(step_directory(root, old), error)
    for path in stale:
        _delete(path)
    return final


def remove(directory: Path) -> None:
    """Make a directory invisible by a rename, then delete it. A missing directory is no error.

    Raises `OSError` if it cannot be renamed. If it cannot be deleted, a warning is printed. The next save and
    the next start of the run try again.
    """
    doomed = directory.with_name(f".stale-{directory.name.lstrip('.')}-{time.time_ns()}")
    with contextlib.suppress(FileNotFoundError):
        directory.rename(doomed)
        _delete(doomed)


def remove_leftovers(root: Path) -> None:
    """Delete directories whose removal or replacement was interrupted."""
    for path in _entries(root):
        if path.name.startswith((".stale-", ".replaced-")):
            _delete(path)


def _delete(path: Path) -> None:
    """Delete a directory, or a link to one, as far as possible. Prints the reason if something is left."""
    try:
        if path.is_symlink():
            path.unlink()
            return
        shutil.rmtree(path, ignore_errors=True)
        if path.is_dir():
            shutil.rmtree(path)  # this second call raises the reason
    except FileNotFoundError:
        pass  # another process has deleted it
    except OSError as error:
        _say_not_deleted(path, error)


def _say_not_deleted(path: Path, error: OSError) -> None:
    say(
        f"{path} cannot be deleted: {error.filename or path}: {error.strerror}. It keeps its disk space "
        "until it is deleted, and the next save tries again"
    )


def _put_into_place(partial: Path, final: Path) -> None:
    """Rename `partial` to `final`.

    If an earlier incarnation has published this step, move that away first.
    """
    aside = partial.with_name(f".replaced-{partial.name.lstrip('.')}")
    with contextlib.suppress(FileNotFoundError):
        final.rename(aside)
    try:
        partial.rename(final)
    except OSError:
        # A newer incarnation has deleted `partial`. What was moved away may be its checkpoint, so restore it.
        with contextlib.suppress(OSError):
            aside.rename(final)
        raise
    _delete(aside)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises `DamagedCheckpoint` if there is none, if it cannot be read, or if it belongs to another step than
    the directory's name says. In the last case the directory has been copied or renamed.
    """
    try:
        manifest = read_object(directory / MANIFEST, "the manifest of a checkpoint")
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error
    digest = manifest.pop("sha256", None)
    if digest != sha256_of_json(manifest):
        raise DamagedCheckpoint(f"{directory / MANIFEST}: content differs from its own checksum")
    named = re.fullmatch(r"step-(\d+)", directory.name, re.ASCII)
    if named and int(named[1]) != manifest.get("step"):
        raise DamagedCheckpoint(
            f"{directory / MANIFEST}: it is of step {manifest.get('step')}, so the directory has been copied "
            "or renamed"
        )
    return manifest


def verify_step(directory: Path, *, part: int = 0, parts: int = 1) -> None:
    """Check the sizes of all files of a checkpoint, and the checksums of every `parts`-th of them.

    part: number of this share, from 0 to `parts` - 1. Raises `DamagedCheckpoint` for the first file that is
    missing or has another size or content.
    """
    files = read_manifest(directory)["files"]
    for index, (name, entry) in enumerate(sorted(files.items())):
        check_file(directory, name, entry, content=index % parts == part)


def check_file(directory: Path, name: str, entry: dict[str, Any], *, content: bool) -> None:
    """Compare a file with its entry in the manifest: its size and, with `content`, its checksum.

    Raises `DamagedCheckpoint` if they differ.
    """
    path = directory / name
    if Path(name).name != name:
        raise DamagedCheckpoint(f"{directory}: manifest names {name!r}, which is outside the checkpoint")
    if not path.is_file():
        raise DamagedCheckpoint(f"{path}: missing")
    if path.stat().st_size != entry["bytes"]:
        raise DamagedCheckpoint(f"{path}: {path.stat().st_size} bytes, {entry['bytes']} in the manifest")
    if not content:
        return
    found = [of_file(path) == entry[kind] for kind, of_file in _CHECKSUMS.items() if kind in entry]
    if not found:
        raise DamagedCheckpoint(f"{path}: the manifest has no checksum of a kind that this version knows")
    if not all(found):
        raise DamagedCheckpoint(f"{path}: content differs from the manifest's checksum")


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
