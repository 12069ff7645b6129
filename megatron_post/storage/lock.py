"""A lock on a name, held by one process at a time and given up when the process ends in whatever way."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def locked(file: IO[str], *, wait: bool) -> bool:
    """Whether a lock on an open file was obtained.

    Also true where the file system has no locks: then nobody has one.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


@contextlib.contextmanager
def sole_writer(path: Path, *, of: Path) -> Iterator[None]:
    """Hold the lock file `path` while something is written, and remove it afterwards.

    of: what is written, for the message. Raises `ValueError` that names the process which holds the lock.
    """
    while True:
        file = path.open("a+")
        if not locked(file, wait=False):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(f"{of} is being written by {holder}; wait until it has finished, or end it")
        # the one who held it has removed the file meanwhile, and others may hold a new one of this name
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
