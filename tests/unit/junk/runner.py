"""A copy of the world that heals between inputs, and limits on the time and the memory of one input."""

import contextlib
import faulthandler
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

SEED = int(os.environ.get("JUNK_SEED", 0))
SECONDS = 20  # for one input; the slowest valid one takes two on an idle machine
GIGABYTES = 2  # that one input may take
ENOUGH = "not enough memory"  # no small file may ask for more


class TooSlow(BaseException):
    """An input that did not end in time. Nothing catches it by accident."""


def inputs(default: int) -> int:
    """How many inputs to try: what the environment says, where the default is not a bare minimum."""
    return int(os.environ.get("JUNK_INPUTS", default)) if default > 5 else default


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Raises `TooSlow` after `SECONDS`. A number in a file cannot take all memory of the machine."""

    def stop(*_: object) -> None:
        raise TooSlow(f"no end within {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    # where a library waits in C and no signal reaches this thread, the stacks say where
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__)
    memory = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 2**30, memory[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


class Copy:
    """A copy of a directory, in which an input is tried."""

    def __init__(self, original: Path, place: Path) -> None:
        self._original, self._place = original, place
        shutil.copytree(original, place)
        self._known = self._listed()

    def heal(self) -> None:
        """Make it the working directory, and replace what has changed. To copy all of it takes far longer."""
        os.chdir(self._place)
        for name, stamp in sorted(self._listed().items(), reverse=True):
            if self._known.get(name) != stamp:
                is_directory = Path(name).is_dir() and not Path(name).is_symlink()
                shutil.rmtree(name) if is_directory else Path(name).unlink()
        for name in sorted(self._known.keys() - self._listed().keys()):
            source = self._original / name
            Path(name).mkdir() if source.is_dir() else shutil.copy(source, name)
            self._known[name] = _stamp(Path(name))

    def _listed(self) -> dict[str, tuple[int, ...]]:
        found = {}
        for folder, directories, files in os.walk(self._place):
            for name in (*directories, *files):
                path = Path(folder, name)
                found[str(path.relative_to(self._place))] = _stamp(path)
        return found


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes when the file does; of a directory, whether it is this one."""
    found = path.lstat()
    kind = (found.st_mode, found.st_ino)
    return kind if path.is_dir() and not path.is_symlink() else (*kind, found.st_size, found.st_mtime_ns)
