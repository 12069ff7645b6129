"""Parts that benchmarks of whole models on a disk share: timing `cp`, and timing a function in a process."""

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
    """Seconds that `cp` takes, and seconds until its bytes are also on the disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    plain = time.perf_counter() - started
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return plain, time.perf_counter() - started


def in_own_process(function: Callable[..., Any], *args: Any, workers: int = 1) -> tuple[float, float]:
    """Seconds of `function(*args)` in a new process, and the peak memory in MiB.

    The peak is that process's. With several workers it is the peak of the largest worker.
    """
    context = multiprocessing.get_context("spawn")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=_serve, args=(child_end, workers, function, *args))
    process.start()
    child_end.close()  # otherwise recv would wait forever for a process that died
    try:
        result: tuple[float, float] = parent_end.recv()
    except BaseException:  # this process is interrupted, or the other one has died
        process.terminate()
        raise
    finally:
        process.join()
    return result


def _serve(connection: Connection, workers: int, function: Callable[..., Any], *args: Any) -> None:
    started = time.perf_counter()
    function(*args)
    seconds = time.perf_counter() - started
    # For children, ru_maxrss is the peak of the largest one. Linux counts it in KiB.
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    connection.send((seconds, (peak_rss() if workers == 1 else children) / 2**20))
