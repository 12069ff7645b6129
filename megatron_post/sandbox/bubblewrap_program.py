"""The processes and files of a program in bubblewrap, and how it ends."""

import contextlib
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import BinaryIO

from megatron_post.sandbox.supervise import SECONDS_TO_END, BrokenSandbox

WORK = "/tmp/work"  # the working directory of a program, in its own tmpfs
_INODE = 4096  # bytes that a file counts in addition to its content


class BubblewrapProgram:
    """A program that runs in bubblewrap."""

    def __init__(self, process: subprocess.Popen[bytes], status: BinaryIO) -> None:
        self.process = process
        self._status = status
        self._disk: int | None = None
        self.root: int | None = None
        self._first: int | None = None  # a pidfd of root, because its number may be reused
        if not _readable(status.fileno()) or not (line := status.readline()):
            self._kill_group()  # bubblewrap failed and may have left a process that waits for it
        else:
            self.root = json.loads(line)["child-pid"]
            with contextlib.suppress(ProcessLookupError):
                self._first = os.pidfd_open(self.root)
            for pid in (process.pid, self.root):  # the kernel kills these first if memory runs out
                with contextlib.suppress(OSError):
                    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")

    def disk_bytes(self) -> int:
        """Bytes that the program's files take.

        The tmpfs is opened through the program's root, and kept open so that it outlives the program.
        """
        if self._disk is None:
            self._disk = self._open_disk()
        if self._disk is None:
            return 0
        disk = os.fstatvfs(self._disk)
        return (disk.f_blocks - disk.f_bfree) * disk.f_frsize + (disk.f_files - disk.f_ffree) * _INODE

    def _open_disk(self) -> int | None:
        """A descriptor of the tmpfs, or None while bubblewrap is mounting and /tmp is still the host's."""
        try:
            disk = os.open(f"/proc/{self.root}/root/tmp", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            return None
        if os.fstat(disk).st_dev != os.stat("/tmp").st_dev:
            return disk
        os.close(disk)
        return None

    def kill(self) -> None:
        """Kill the first process of the namespace. The kernel then kills all its other processes."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._first is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._first, signal.SIGKILL)
                self.process.wait(1)  # bubblewrap then ends by itself and leaves no zombie
        self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def finish(self, *, killed: bool) -> None:
        # The first process of a namespace only ends after all others have ended.
        if self._first is not None and not _readable(self._first):
            raise BrokenSandbox(f"process {self.root} of a sandbox was killed and does not end")
        if not killed and not any(b"exit-code" in line for line in self._status):
            raise BrokenSandbox("bubblewrap did not start the program")

    def close(self) -> None:
        for descriptor in (self._disk, self._first):
            if descriptor is not None:
                os.close(descriptor)


def _readable(descriptor: int) -> bool:
    """Wait until there is something to read. `select` cannot be used for descriptors above 1023."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(SECONDS_TO_END * 1000))
