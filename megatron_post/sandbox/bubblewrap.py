"""bubblewrap: its command line, and what a program sees of the host in it.

A program sees /usr and the directories of the tools, all of them read-only, and one tmpfs of a fixed size for
what it writes. It has namespaces of its own of every kind, no capability, and a filter of system calls.
"""

import contextlib
import glob
import json
import math
import os
import platform
import re
import select
import shutil
import signal
import site
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_post.installation import install_system_package
from megatron_post.sandbox.settings import Bubblewrap, Limits
from megatron_post.sandbox.supervise import MIB, SECONDS_TO_END, BrokenSandbox
from megatron_post.sandbox.syscalls import filter_program

_WORK = "/tmp/work"  # where a program starts, in the sandbox
_USER = "65533"  # in the sandbox, and outside where this process is root: systemd's table leaves it unused
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")  # links into /usr, or directories
_ETC = ("alternatives", "java-*", "ld.so.cache")  # of /etc: where Debian's java and c++ have their parts
_DEVICES = ("null", "zero", "full", "random", "urandom")
_NAMES = {  # files of /etc without which the user and localhost have no name
    "passwd": f"sandbox:x:{_USER}:{_USER}::{_WORK}:/bin/sh\n",
    "group": f"sandbox:x:{_USER}:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
}
_TOOLS = ("node", "g++", "java", "javac")
# Directories that root can reach, and _USER perhaps not. Root mounts them here, in a copy of its mounts that
# no other process sees. /sys is there everywhere, and bubblewrap does not need it
_REACHABLE = "/sys"
_MOUNT = """
set -e
mount -t tmpfs tmpfs "$1"
cd "$1"
shift
number=0
while [ "$1" != -- ]; do mkdir $number; mount --rbind "$1" $number; number=$((number + 1)); shift; done
cd /
shift
exec "$@"
"""
_INODE = 4096  # bytes that a file counts beside its content
_STACK = 8 * MIB
_COUNTED_IN_NAMESPACE = (5, 14)  # Linux, from which on a user's processes are counted in each namespace


class BubblewrapSandbox:
    """Starts programs in bubblewrap.

    Raises `ValueError` where bubblewrap or a directory is missing, and on a processor without a filter.
    """

    def __init__(self, settings: Bubblewrap) -> None:
        self._is_root = os.getuid() == 0
        needed = ["bwrap", "prlimit", *(["setpriv", "unshare", "mount"] if self._is_root else [])]
        self._found = {name: shutil.which(name) or "" for name in needed}
        if missing := [name for name, path in self._found.items() if not path]:
            raise ValueError(f"sandbox: {', '.join(missing)} cannot be found; {self.remedy()}")
        for path in settings.read_only:
            if not Path(path).is_dir():
                raise ValueError(f"sandbox.read_only: {path} is no directory")
        self._filter = filter_program()
        self._settings = settings
        # of bubblewrap, which a program can read in /proc/1/environ; mount needs a path
        self._environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} if self._is_root else {}
        self._tools = _toolchains()
        self._packages = [path for path in site.getsitepackages([sys.base_prefix]) if Path(path).is_dir()]
        self._outside = list(dict.fromkeys([*self._tools, *settings.read_only]))

    @staticmethod
    def remedy() -> str:
        return (
            f"{install_system_package('bubblewrap')} (version 0.8 or newer), or set sandbox.kind=command "
            "with a container command of your site"
        )

    @contextlib.contextmanager
    def start(
        self, files: Mapping[str, bytes], command: Sequence[str], limits: Limits
    ) -> Iterator["BubblewrapProgram"]:
        """A program that runs. Its files have no name on the host."""
        with contextlib.ExitStack() as stack:
            handed: list[int] = []

            def hand(content: bytes) -> str:
                handed.append(_in_memory(content))
                stack.callback(os.close, handed[-1])
                return str(handed[-1])

            status, writer = os.pipe()
            reader = stack.enter_context(open(status, "rb"))
            with open(writer, "wb"):
                words = [*self._unprivileged(), *self._limited(limits), self._found["bwrap"]]
                words += ["--json-status-fd", str(writer), "--seccomp", hand(self._filter)]
                words += [*self._isolated(limits), *self._host(), *_own(limits)]
                for path in self._settings.read_only:
                    words += ["--ro-bind", self._reachable(path), path]
                for name, text in _NAMES.items():
                    words += ["--file", hand(text.encode()), f"/etc/{name}"]
                for name, content in files.items():
                    words += ["--file", hand(content), f"{_WORK}/{name}"]
                words += ["--remount-ro", "/", "--chdir", _WORK, "--"]
                process = subprocess.Popen(
                    [*words, *self._counted(limits), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=self._environment,
                    pass_fds=[writer, *handed],
                    start_new_session=True,
                )
            program = BubblewrapProgram(process, reader, limits)
            stack.callback(program.close)
            yield program

    def _unprivileged(self) -> list[str]:
        """Root alone: give up its rights. A process of root could change the kernel's settings in /proc, and
        its processes are not counted."""
        if not self._is_root:
            return []
        words = []
        if self._outside:
            words = [self._found["unshare"], "--mount", "--propagation", "private", "sh", "-c", _MOUNT]
            words += ["sh", _REACHABLE, *self._outside, "--"]
        return [
            *words,
            self._found["setpriv"],
            f"--reuid={_USER}",
            f"--regid={_USER}",
            "--clear-groups",
            "--",
        ]

    def _reachable(self, path: str) -> str:
        return f"{_REACHABLE}/{self._outside.index(path)}" if self._is_root else path

    def _limited(self, limits: Limits) -> list[str]:
        """What the kernel limits in each process, wherever a program may start it.

        memory and processes: twice the limit, because the kernel would only fail a call. The watcher, which
        names the limit and kills, comes first. core: with 0, the host's program for core dumps would run.
        """
        seconds = math.ceil(limits.cpu_seconds) + 1
        return [
            self._found["prlimit"], "--core=1", f"--cpu={seconds}:{seconds + 1}",
            f"--fsize={limits.disk_mib * MIB}", f"--data={2 * (limits.memory_mib + 128) * MIB}",
            f"--nofile={limits.open_files}", f"--stack={_STACK}", "--memlock=0", "--msgqueue=0", "--",
        ]  # fmt: skip

    def _counted(self, limits: Limits) -> list[str]:
        release = re.match(r"(\d+)\.(\d+)", platform.release())
        if release is None or (int(release[1]), int(release[2])) < _COUNTED_IN_NAMESPACE:
            return []  # it would count all processes of the user on this machine; the watcher counts these
        return [self._found["prlimit"], f"--nproc={2 * limits.processes + 32}", "--"]

    def _isolated(self, limits: Limits) -> list[str]:
        path = ":".join([*(f"{prefix}/bin" for prefix in self._tools), "/usr/local/bin:/usr/bin:/bin"])
        variables = {
            "PATH": path, "HOME": _WORK, "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MEMORY_MIB": str(limits.memory_mib),
            **self._settings.environment,
        }  # fmt: skip
        words = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        words += ["--uid", _USER, "--gid", _USER, "--hostname", "sandbox", "--clearenv"]
        return words + [word for item in variables.items() for word in ("--setenv", *item)]

    def _host(self) -> list[str]:
        """What is seen of the host. Its Python packages are hidden: a program finds the same everywhere."""
        words = ["--ro-bind", "/usr", "/usr"]
        for path in _SYSTEM:
            if os.path.islink(path):
                words += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                words += ["--ro-bind", path, path]
        for pattern in _ETC:
            for path in glob.glob(f"/etc/{pattern}"):
                words += ["--ro-bind", path, path]
        for path in self._tools:
            words += ["--ro-bind", self._reachable(path), path]
        for path in self._packages:
            words += ["--tmpfs", path, "--remount-ro", path]
        for name in _DEVICES:
            words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
        return words


class BubblewrapProgram:
    """A program that runs in bubblewrap."""

    def __init__(self, process: subprocess.Popen[bytes], status: Iterator[bytes], limits: Limits) -> None:
        self.process = process
        self._status = status
        self._size = limits.disk_mib * MIB
        self._disk: int | None = None
        first = next(status, b"{}")  # written before anything is mounted; empty where that failed
        self.root: int | None = json.loads(first).get("child-pid")
        self._first: int | None = None  # a descriptor of that process: its number may be another's later
        if self.root is not None:
            with contextlib.suppress(ProcessLookupError):
                self._first = os.pidfd_open(self.root)
            for pid in (process.pid, self.root):  # the kernel's choice where memory runs out
                with contextlib.suppress(OSError):
                    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")

    def disk_bytes(self) -> int:
        """The tmpfs is seen through the program's own root, and held open so that it is there at the end."""
        if self._disk is None:
            self._disk = self._open_disk()
        if self._disk is None:
            return 0
        disk = os.fstatvfs(self._disk)
        return (disk.f_blocks - disk.f_bfree) * disk.f_frsize + (disk.f_files - disk.f_ffree) * _INODE

    def _open_disk(self) -> int | None:
        """None while bubblewrap is still mounting, and /tmp is the host's."""
        try:
            disk = os.open(f"/proc/{self.root}/root/tmp", os.O_PATH | os.O_DIRECTORY)
        except OSError:
            return None
        size = os.fstatvfs(disk)
        if os.fstat(disk).st_dev != os.stat("/tmp").st_dev and size.f_blocks * size.f_frsize == self._size:
            return disk
        os.close(disk)
        return None

    def kill(self) -> None:
        """All processes of a namespace end with its first one."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._first is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._first, signal.SIGKILL)
                self.process.wait(1)  # bubblewrap ends on its own, and leaves no zombie for others
        self.process.kill()

    def finish(self, *, killed: bool) -> None:
        # the first process of a namespace is over when all others are
        if self._first is not None and not select.select([self._first], [], [], SECONDS_TO_END)[0]:
            raise BrokenSandbox(f"process {self.root} of a sandbox was killed and does not end")
        if not killed and not any(b"exit-code" in line for line in self._status):
            raise BrokenSandbox("bubblewrap did not start the program")

    def close(self) -> None:
        for descriptor in (self._disk, self._first):
            if descriptor is not None:
                os.close(descriptor)


def _own(limits: Limits) -> list[str]:
    """/proc of the program's own processes, and the one place where it can write."""
    size = str(limits.disk_mib * MIB)
    words = ["--proc", "/proc", "--perms", "0700", "--size", size, "--tmpfs", "/tmp", "--dir", _WORK]
    links = {"shm": "/tmp", "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
    return words + [word for name, path in links.items() for word in ("--symlink", path, f"/dev/{name}")]


def _toolchains() -> list[str]:
    """Directories outside /usr that hold Python, and the tools which are on the PATH of this process."""
    found = [Path(sys.base_prefix).resolve()]
    for name in _TOOLS:
        if path := shutil.which(name):
            found.append(Path(path).resolve().parents[1])
    if shutil.which("rustc"):  # may be rustup's, which starts the one that it has chosen
        command = ["rustc", "--print", "sysroot"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
        if done.returncode == 0:
            found.append(Path(done.stdout.strip()).resolve())
    outside = (path for path in found if path != Path("/") and path.parts[:2] != ("/", "usr"))
    return list(dict.fromkeys(map(str, outside)))


def _in_memory(content: bytes) -> int:
    """Descriptor of a file that has this content and no name."""
    descriptor = os.memfd_create("sandbox")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
