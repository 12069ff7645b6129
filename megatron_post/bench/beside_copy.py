"""What benchmarks of whole models on a disk share: `cp` to compare with, and a process to measure."""

import multiprocessing
import os
import resource
import subprocess
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_post.bench.memory import peak_rss


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of `cp`, and until its bytes are on the disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    plain = time.perf_counter() - started
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return plain, time.perf_counter() - started


def in_own_process(function: Callable[..., Any], *args: Any, workers: int = 1) -> tuple[float, float]:
    """Seconds of `function(*args)` in a new process, and the peak in MiB of that process, or, with several
    workers, of the largest of these."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, workers, function, *args))
    process.start()
    theirs.close()
    try:
        result: tuple[float, float] = ours.recv()
    except BaseException:  # this process is asked to end, or that one has died
        process.terminate()
        raise
    finally:
        process.join()
    return result


def _serve(connection: Connection, workers: int, function: Callable[..., Any], *args: Any) -> None:
    started = time.perf_counter()
    function(*args)
    seconds = time.perf_counter() - started
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    connection.send((seconds, (peak_rss() if workers == 1 else children) / 2**20))
