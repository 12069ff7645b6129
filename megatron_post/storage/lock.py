"""A lock file that one process holds at a time. The kernel releases it when the process ends or is killed."""

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_post.storage.files import full_disk_explained

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system that has none


def locked(file: IO[str], *, wait: bool) -> bool:
    """Lock an open file. Returns whether this process has the lock.

    Returns True if the file system has no locks, since no other process can have one either.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return True


@contextlib.contextmanager
def only_process_in(directory: Path) -> Iterator[int]:
    """Hold the lock of a directory in which a command works. Gives the lock's file descriptor.

    The lock ends with this process and with all processes that inherit the descriptor. Raises `ValueError` if
    another process holds it.
    """
    with full_disk_explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("w")
    with file:
        if not locked(file, wait=False):
            raise ValueError(
                f"{directory}: another process works here, or a step of one that was killed still does; "
                "wait for it, or end it"
            )
        yield file.fileno()


@contextlib.contextmanager
def turn_in(directory: Path) -> Iterator[None]:
    """Wait until no other process of a run is in this context, in which files that they share are written."""
    with (directory / ".lock").open("a") as file:
        locked(file, wait=True)
        yield


@contextlib.contextmanager
def claim(path: Path, number: int) -> Iterator[bool]:
    """Gives whether this process has piece `number` of some work. It never waits for another process.

    path: the lock file of the work. It has a lock for each number, which is its byte at that place, and it
    stays empty. The lock belongs to the open file, so it also keeps threads apart.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)  # `struct flock`
    with path.open("a") as file:
        is_own = True
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, wanted)
        except (BlockingIOError, PermissionError):  # POSIX allows both for a lock that is held
            is_own = False
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
        yield is_own


@contextlib.contextmanager
def sole_writer(path: Path, *, of: Path) -> Iterator[None]:
    """Hold the lock file `path` while something is written, and remove it afterwards.

    of: what is written, for the message. Raises `ValueError` if another process holds the lock, and names it.
    """
    while True:
        file = path.open("a+")
        if not locked(file, wait=False):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(f"{of} is being written by {holder}; wait until it has finished, or end it")
        # Between opening and locking, the previous holder may have removed this file, and another process may
        # hold the lock on a new file of the same name. The lock counts only if this file is still there.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
