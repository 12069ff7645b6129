"""Writing a file at the disk's speed: one block is written while the next is being read, and the disk never
waits for the end."""

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType


class PartFile:
    """A file that is written in order. It is on the disk when the context ends without an error.

    A block given to `write` must stay as it is until the second call after it: use two in turn.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._threads = ThreadPoolExecutor(2)
        self._ended = threading.Event()
        self._writing: Future[None] | None = None
        self._flushing = self._threads.submit(self._flush)

    def write(self, block: bytes | memoryview) -> None:
        """Raises the error of this block or of one before it."""
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
                self._flushing.result()  # the system reports a failed write once, and it may have been here
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
