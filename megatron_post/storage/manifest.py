"""A checkpoint directory that is complete or invisible: checksums in a JSON manifest, publication by rename.

Nothing here knows what the files hold.
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
from megatron_post.storage.checksums import crc32_of_file, sha256_of_file, sha256_of_json
from megatron_post.storage.files import write_durably
from megatron_post.storage.reading import read_object

MANIFEST = "manifest.json"
LATEST = "latest"
_STEP = re.compile(r"step-(\d{8,})", re.ASCII)
_PARTIAL = re.compile(r"\.partial-step-\d+-epoch-(\d+)-\d+", re.ASCII)
_WORKING = (".partial-step-", ".converting-step-", ".stale-", ".replaced-")


class DamagedCheckpoint(ValueError):
    """A checkpoint that must not be loaded; the message names the file and what is wrong with it."""


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is published."""
    return root / f"step-{step:08d}"


def partial_directory(root: Path, step: int, *, epoch: int = 0, attempt: int = 0) -> Path:
    """Where it is written before that. The name is never mistaken for a published one.

    epoch: of the incarnation of a run that writes it, see `fence`; attempt: which of its saves this is. Both
    are 0 where no run is behind it.
    """
    writer = f"-epoch-{epoch}-{attempt}" if epoch else ""
    return root / f".partial-step-{step:08d}{writer}"


def partial_directories(root: Path, *, before_epoch: int) -> list[Path]:
    """What incarnations of a run before `before_epoch` have been writing."""
    matches = ((path, _PARTIAL.fullmatch(path.name)) for path in _entries(root))
    return [path for path, match in matches if match is not None and int(match[1]) < before_epoch]


def published_steps(root: Path) -> list[int]:
    """Steps with a published directory, or a link to one, oldest first. Whether they are intact is `verify`'s
    to say; other names are `stray_names`."""
    return sorted(int(path.name.removeprefix("step-")) for path in _entries(root) if _is_step(path))


def stray_names(root: Path) -> list[str]:
    """What lies among the checkpoints of a run and is none of its doing: `step-8`, `step-00000008.bak`, a
    file `step-00000009`."""
    own = (*_WORKING, f".{LATEST}", ".nfs")  # .nfs: a file that is deleted and still open somewhere
    names = [path.name for path in _entries(root) if not _is_step(path)]
    return sorted(name for name in names if name != LATEST and not name.startswith(own))


def _is_step(path: Path) -> bool:
    match = _STEP.fullmatch(path.name)
    return match is not None and step_directory(path.parent, int(match[1])) == path and path.is_dir()


def _entries(root: Path) -> list[Path]:
    """Nothing where there is no such directory."""
    try:
        return list(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def checksums(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files of a directory; each is flushed to the disk first."""
    result = {}
    for name in names:
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
        result[name] = {
            "bytes": (directory / name).stat().st_size,
            "sha256": sha256_of_file(directory / name),
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
    """Write the manifest, rename the partial directory into place, move `latest`, drop older checkpoints.

    Of the steps up to this one the newest `keep` stay, and every multiple of `keep_every`. partial: what has
    been written, if it is not in `partial_directory(root, step)`. check: called at the last moment; what it
    raises leaves everything as it is. passed_over: steps that the run cannot use; they are left alone, and
    do not count.
    """
    partial, final = partial or partial_directory(root, step), step_directory(root, step)
    content = {"step": step, "state": state, "files": files}
    write_durably(partial / MANIFEST, json.dumps({"sha256": sha256_of_json(content), **content}, indent=1))
    sync_directory(partial)
    check()
    _put_into_place(partial, final)
    write_durably(root / f".{LATEST}", final.name + "\n")
    (root / f".{LATEST}").replace(root / LATEST)
    sync_directory(root)
    # a newer one is damaged, or this run would have gone on from it: it must not push out a good one
    past = [old for old in published_steps(root) if old <= step and old not in passed_over]
    stale = [path for path in _entries(root) if path.name.startswith(".stale-")]
    for old in past[:-keep]:
        if not keep_every or old % keep_every:
            try:
                remove(step_directory(root, old))
            except OSError as error:  # a run that goes well does not end for it
                _say_not_deleted(step_directory(root, old), error)
    for path in stale:
        _delete(path)
    return final


def remove(directory: Path) -> None:
    """Make a directory of a run invisible at once, then delete it; nothing happens where it is gone.

    Raises `OSError` where it cannot be renamed. What cannot be deleted is said, and tried again when the next
    checkpoint is published and when the run starts again.
    """
    doomed = directory.with_name(f".stale-{directory.name.lstrip('.')}-{time.time_ns()}")
    with contextlib.suppress(FileNotFoundError):
        directory.rename(doomed)
        _delete(doomed)


def remove_leftovers(root: Path) -> None:
    """Delete what was being removed or replaced when its process died."""
    for path in _entries(root):
        if path.name.startswith((".stale-", ".replaced-")):
            _delete(path)


def _delete(path: Path) -> None:
    """Delete a directory, or a link to one, as far as possible, and say why something is left."""
    try:
        if path.is_symlink():
            path.unlink()
            return
        shutil.rmtree(path, ignore_errors=True)
        if path.is_dir():
            shutil.rmtree(path)  # which raises the reason
    except FileNotFoundError:
        pass  # another process has deleted it
    except OSError as error:
        _say_not_deleted(path, error)


def _say_not_deleted(path: Path, error: OSError) -> None:
    say(
        f"{path} cannot be deleted: {error.filename or path}: {error.strerror}; its space is missing "
        "until it is, and the next save tries again"
    )


def _put_into_place(partial: Path, final: Path) -> None:
    """Rename, after moving aside what an earlier incarnation has published of this step."""
    aside = partial.with_name(f".replaced-{partial.name.lstrip('.')}")
    with contextlib.suppress(FileNotFoundError):
        final.rename(aside)
    try:
        partial.rename(final)
    except OSError:
        # another incarnation has taken `partial` away meanwhile, and what stood here may be its work
        with contextlib.suppress(OSError):
            aside.rename(final)
        raise
    _delete(aside)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises `DamagedCheckpoint` where there is none, it cannot be read, or it is of another step than the
    directory's name says: then the directory was copied or renamed."""
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


def verify(directory: Path, *, part: int = 0, parts: int = 1) -> None:
    """Check sizes of all files and checksums of every `parts`-th of them.

    Raises `DamagedCheckpoint` for the first file that is missing, of another size or of another content.
    """
    files = read_manifest(directory)["files"]
    for index, (name, entry) in enumerate(sorted(files.items())):
        check_file(directory, name, entry, content=index % parts == part)


def check_file(directory: Path, name: str, entry: dict[str, Any], *, content: bool) -> None:
    """Compare a file with its entry in the manifest: that it is there and its size, and its content if asked.

    Raises `DamagedCheckpoint` where they differ.
    """
    path = directory / name
    if Path(name).name != name:
        raise DamagedCheckpoint(f"{directory}: manifest names {name!r}, which is outside the checkpoint")
    if not path.is_file():
        raise DamagedCheckpoint(f"{path}: missing")
    if path.stat().st_size != entry["bytes"]:
        raise DamagedCheckpoint(f"{path}: {path.stat().st_size} bytes, {entry['bytes']} in the manifest")
    # converted weights carry CRC-32, which keeps up with the disk where the processor has no SHA instructions
    if not content:
        return
    kind, of_file = ("crc32", crc32_of_file) if "crc32" in entry else ("sha256", sha256_of_file)
    if of_file(path) != entry[kind]:
        raise DamagedCheckpoint(f"{path}: content differs from the manifest's checksum")


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
