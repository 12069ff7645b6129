"""Runs a conversion as files that are written independently, by any number of processes and nodes.

Processes share nothing but the file system. Each process owns every n-th part. A finished part has a marker
file, so an interrupted conversion resumes where it stopped. A process that finds all markers publishes the
result, under a lock.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_post.convert.part_file import PartFile
from megatron_post.display import make_console
from megatron_post.parallel.environment import rank_from_environment
from megatron_post.progress import WorkProgress
from megatron_post.storage.files import is_disk_full
from megatron_post.storage.lock import locked
from megatron_post.storage.reading import read_object

Report = Callable[[str], None]
_SECONDS_BETWEEN_LOOKS = 1.0


class ConversionError(ValueError):
    """A conversion that cannot start or continue. The message says what was kept and what to do."""


@dataclass(frozen=True)
class Part:
    """One file of the target. nbytes: the size of its tensors. The file itself is a little larger."""

    name: str
    nbytes: int


class Job(Protocol):
    """A conversion. It is a dataclass of plain values, so that it can be sent to another process.

    target: the directory that appears when the conversion is complete. partial: the directory in which files
    grow. settings: the values that another run of the conversion must share.
    """

    @property
    def target(self) -> Path: ...
    @property
    def partial(self) -> Path: ...
    @property
    def settings(self) -> dict[str, str | int | None]: ...
    @property
    def parts(self) -> Sequence[Part]: ...

    def write_part(self, number: int, file: PartFile) -> dict[str, Any]:
        """Write a part. Returns the plain values that `publish` needs from it."""

    def publish(self, records: list[dict[str, Any]]) -> None:
        """Write the files that depend on all parts, and rename `partial` to `target`."""


@dataclass(frozen=True)
class Converted:
    """The result of `convert`.

    is_complete: False if other nodes are still writing. nbytes: the tensors that this call has written.
    seconds: the time that this took.
    """

    directory: Path
    is_complete: bool
    nbytes: int
    seconds: float


def convert(job: Job, *, workers: int, report: Report) -> Converted:
    """Do this node's share of a conversion.

    Raises `ConversionError` if the target exists, if an unfinished conversion with other settings has the
    directory, and if the disk is full.
    """
    if workers < 1:
        raise ConversionError(f"--workers {workers}: at least one is needed")
    node, nodes = worker_environment()
    with _disk_errors_explained(job):
        if job.target.exists():
            if nodes > 1:
                report(f"{job.target} is complete")
                return Converted(job.target, True, 0, 0.0)
            raise ConversionError(f"{job.target} exists already; choose another directory, or remove it")
        # reading these checks the source before anything is written
        settings, count = job.settings, len(job.parts)
        _claim(job, settings)
        _check_space(job)
    started, before = time.perf_counter(), len(_done(job))
    if before:
        report(f"resuming {job.partial}: {before} of {count} parts are complete")
    with _shown(job):
        moved = _write_share(job, node, nodes, workers)
    seconds = time.perf_counter() - started
    report(f"{moved / 1e6:,.0f} MB in {seconds:.1f} s, {moved / 1e6 / seconds:,.0f} MB/s")
    with _disk_errors_explained(job):
        return Converted(job.target, _finish(job, report), moved, seconds)


@contextlib.contextmanager
def _shown(job: Job) -> Iterator[None]:
    """Show how much of the target all processes and nodes have written, from the sizes of its files."""
    total, ended = sum(part.nbytes for part in job.parts), threading.Event()

    def look(progress: WorkProgress) -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            with contextlib.suppress(OSError):  # another process may have just renamed or published a file
                progress.reach(min(_written(job), total) / 1e6)

    done = min(_written(job), total) / 1e6
    with WorkProgress(
        f"writing {job.target.name}", total=total / 1e6, done=done, unit="MB", console=make_console()
    ) as progress:
        thread = threading.Thread(target=look, args=(progress,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _write_share(job: Job, node: int, nodes: int, workers: int) -> int:
    """Write this node's share of the parts. Returns the tensor bytes written."""
    indices = [node * workers + i for i in range(workers)]
    if workers == 1:
        return _write_parts(job, indices[0], nodes)
    # Each worker is a new interpreter, because forking a process in which torch has run threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        tasks = [pool.submit(_write_parts, dataclasses.replace(job), i, nodes * workers) for i in indices]  # type: ignore[type-var]
        try:
            return sum(task.result() for task in tasks)
        except BrokenProcessPool as error:
            raise ConversionError(
                f"{job.partial}: a worker was killed, perhaps because memory ran out; finished parts are "
                "kept; run the same command again, if necessary with fewer --workers"
            ) from error


def worker_environment() -> tuple[int, int]:
    """(index, count) of this process among all processes of torchrun or srun and all tasks of a Slurm array.

    Raises `ConversionError` for an array whose ids are unevenly spaced.
    """
    rank, size, _ = rank_from_environment()
    env = os.environ
    tasks = int(env.get("SLURM_ARRAY_TASK_COUNT", 1))
    if tasks == 1:
        return rank, size
    first, last = int(env["SLURM_ARRAY_TASK_MIN"]), int(env["SLURM_ARRAY_TASK_MAX"])
    stride = (last - first) // (tasks - 1)
    task, remainder = divmod(int(env["SLURM_ARRAY_TASK_ID"]) - first, stride)
    if remainder or first + stride * (tasks - 1) != last:
        raise ConversionError("the Slurm array's ids are unevenly spaced; submit it as --array=0-N")
    return task * size + rank, tasks * size


def _state_directory(job: Job) -> Path:
    """The directory of the markers and the lock. It is beside the target and never becomes part of it."""
    return job.target.with_name(f".converting-{job.target.name}")


def _claim(job: Job, settings: dict[str, str | int | None]) -> None:
    """Make the directories, or join a conversion with the same settings."""
    state = _state_directory(job)
    state.mkdir(parents=True, exist_ok=True)
    record = state / "conversion.json"
    own = state / f".conversion.{_own_suffix()}"
    own.write_text(json.dumps(settings))
    try:
        # A link is atomic and fails if the record exists. Of several processes that start at once, exactly
        # one writes the record.
        os.link(own, record)
    except FileExistsError:
        pass
    finally:
        own.unlink()
    found = read_object(record, "the record of a conversion")
    if found != settings:
        changed = [key for key in settings if found.get(key) != settings[key]]
        raise ConversionError(
            f"{state} belongs to an unfinished conversion with another {', '.join(changed)}; finish that one "
            f"with its own command, or remove {state} and {job.partial}"
        )
    job.partial.mkdir(parents=True, exist_ok=True)


def _written(job: Job) -> int:
    """Bytes in the files of the target so far."""
    written = 0
    with contextlib.suppress(FileNotFoundError):  # another process may have just published the target
        for file in os.scandir(job.partial):
            with contextlib.suppress(FileNotFoundError):  # another worker may have just renamed it
                written += file.stat().st_size
    return written


def _check_space(job: Job) -> None:
    needed = sum(part.nbytes for part in job.parts) - _written(job)
    free = shutil.disk_usage(job.partial).free
    if needed > free:
        raise ConversionError(
            f"{job.partial} needs another {needed:,} bytes and its disk has {free:,} free; the source is "
            "unchanged; free some space and run the same command again"
        )


def _done(job: Job) -> dict[int, dict[str, Any]]:
    """Records of the parts that are complete."""
    state, records = _state_directory(job), {}
    if not job.partial.is_dir():
        return {}
    # A network file system reads a directory listing from the server. A lookup of one name may be answered
    # from a stale cache.
    markers, files = set(os.listdir(state)), set(os.listdir(job.partial))
    for number, part in enumerate(job.parts):
        if f"{part.name}.json" in markers and part.name in files:
            record = read_object(state / f"{part.name}.json", "the record of a part")
            if (job.partial / part.name).stat().st_size == record.get("bytes"):
                records[number] = record
    return records


def _write_parts(job: Job, index: int, count: int) -> int:
    """Write every `count`-th part from `index` on that is not complete. Returns the tensor bytes written."""
    done, moved = _done(job), 0
    for number in range(index, len(job.parts), count):
        if number not in done:
            with _disk_errors_explained(job), _unless_published(job):
                moved += _write_part(job, number)
    return moved


@contextlib.contextmanager
def _unless_published(job: Job) -> Iterator[None]:
    """Ignore missing files if another process has published the target in the meantime."""
    try:
        yield
    except FileNotFoundError:
        if not job.target.exists():
            raise


@contextlib.contextmanager
def _disk_errors_explained(job: Job) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise ConversionError(
                f"{error.filename or job.partial}: {error.strerror or error}; the source is unchanged"
            ) from error
        raise ConversionError(
            f"{job.partial}: {error.strerror}; the source is unchanged and {len(_done(job))} of "
            f"{len(job.parts)} parts are kept; free some space and run the same command again"
        ) from error


def _write_part(job: Job, number: int) -> int:
    """Returns the part's tensor bytes, or 0 if another process of the same conversion writes it."""
    name, state = job.parts[number].name, _state_directory(job)
    with (state / f"{name}.lock").open("w") as lock:
        if not locked(lock, wait=False):
            return 0
        # Another process may have completed the part before this one got the lock.
        if (state / f"{name}.json").exists() and number in _done(job):
            return 0
        # The name is unique to this process. A worker whose parent was killed may still be writing, and must
        # not write into the file of another worker.
        for stale in job.partial.glob(f".{name}.*"):
            stale.unlink(missing_ok=True)
        growing = job.partial / f".{name}.{_own_suffix()}"
        try:
            with PartFile(growing) as file:
                record = job.write_part(number, file)
            record["bytes"] = growing.stat().st_size
            growing.rename(job.partial / name)
        except BaseException:
            growing.unlink(missing_ok=True)
            raise
        # The marker is written after the part, because it must never exist without the part.
        marker = state / f".{name}.{_own_suffix()}"
        marker.write_text(json.dumps(record))
        marker.rename(state / f"{name}.json")
    return job.parts[number].nbytes


def _finish(job: Job, report: Report) -> bool:
    """Publish the target if all parts are complete and no other process has published it."""
    state = _state_directory(job)
    with _unless_published(job):
        left = len(job.parts) - len(_done(job))
        if left and not job.target.exists():
            report(
                f"{left} of {len(job.parts)} parts are not complete; "
                f"the process that completes them publishes {job.target}"
            )
            return False
        with (state / "lock").open("w") as lock:
            # Several processes may find all parts complete at the same time, but only one may publish.
            locked(lock, wait=True)
            if not job.target.exists():
                records = _done(job)
                for stray in job.partial.glob(".*"):
                    if stray.is_file() and any(stray.name.startswith(f".{p.name}.") for p in job.parts):
                        stray.unlink(missing_ok=True)
                job.publish([records[number] for number in range(len(job.parts))])
    shutil.rmtree(state, ignore_errors=True)
    report(f"{job.target} is complete")
    return True


def _end_with_parent() -> None:
    """Ends a worker when its parent ends. Otherwise it would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _own_suffix() -> str:
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    return f"{host}-{os.getpid()}"
