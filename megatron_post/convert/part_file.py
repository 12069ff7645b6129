"""Writes a file at the speed of the disk.

One block is written while the next block is being read. A thread flushes the file all the time, so that the
disk does not wait for the end.
"""

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType


class PartFile:
    """A file that is written in order. It is on the disk when the context ends without an error.

    A block that is passed to `write` must not change until the second call after it. Two buffers that are
    used in turn are enough.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._threads = ThreadPoolExecutor(2)
        self._ended = threading.Event()
        self._writing: Future[None] | None = None
        self._flushing = self._threads.submit(self._flush)

    def write(self, block: bytes | memoryview) -> None:
        """Start to write a block. Raises the error of an earlier block."""
        self._wait()
        self._writing = self._threads.submit(self._write, block)

    def __enter__(self) -> "PartFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait()
        finally:
            self._ended.set()
            self._threads.shutdown()
        with self._file:
            if error is None:
                self._flushing.result()  # the system reports a failed write only once, perhaps to this flush
                os.fsync(self._file.fileno())

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write(self, block: bytes | memoryview) -> None:
        view, done = memoryview(block), 0
        while done < len(view):
            done += os.write(self._file.fileno(), view[done:])

    def _flush(self) -> None:
        while not self._ended.wait(0.05):
            os.fdatasync(self._file.fileno())
