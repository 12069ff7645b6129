"""Builds the command line of bubblewrap, which determines what a program sees of the host.

A program sees /usr and the directories of the tools, all of them read-only. It writes to one tmpfs of a fixed
size. It has its own namespaces of every kind, no capabilities, and a filter of system calls.
"""

import contextlib
import glob
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_post.installation import install_system_package
from megatron_post.sandbox import toolchains
from megatron_post.sandbox.bubblewrap_program import WORK, BubblewrapProgram
from megatron_post.sandbox.kernel_limits import MIB, inside_a_namespace, of_each_process
from megatron_post.sandbox.settings import Bubblewrap, Limits
from megatron_post.sandbox.syscalls import filter_program

# The user in the sandbox, and outside it if this process is root. systemd's table of users leaves it unused.
_USER = "65533"
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")  # links into /usr, or directories
_ETC = ("alternatives", "java-*", "ld.so.cache")  # parts of /etc that Debian's java and c++ need
_DEVICES = ("null", "zero", "full", "random", "urandom")
_NAMES = {  # files of /etc without which the user and localhost have no name
    "passwd": f"sandbox:x:{_USER}:{_USER}::{WORK}:/bin/sh\n",
    "group": f"sandbox:x:{_USER}:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
}
# _USER may lack the rights to reach some directories that root can reach. Root mounts them here, in a private
# mount namespace. The directory is /sys because it exists everywhere and bubblewrap does not need it.
_REACHABLE = "/sys"
_MOUNT = """
set -e
place=$1
mount -t tmpfs tmpfs "$place"
shift
number=0
while [ "$1" != -- ]; do
    mkdir "$place/$number"
    mount --rbind "$1" "$place/$number"
    number=$((number + 1))
    shift
done
shift
exec "$@"
"""


_OTHERWISE = "or set sandbox.kind=command with a container command of your site"


class BubblewrapSandbox:
    """Starts programs in bubblewrap.

    Raises `ValueError` if bubblewrap or a directory is missing, or if there is no filter for the processor.
    """

    remedy = (
        "bubblewrap 0.4 or newer needs user namespaces: see sysctl user.max_user_namespaces, "
        "kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns, and the seccomp "
        f"profile if this is a container; {_OTHERWISE}"
    )

    def __init__(self, settings: Bubblewrap) -> None:
        self._is_root = _is_root()
        needed = ["bwrap", "prlimit", *(["setpriv", "unshare", "mount"] if self._is_root else [])]
        self._found = {name: shutil.which(name) or "" for name in needed}
        if missing := [name for name, path in self._found.items() if not path]:
            install = install_system_package("bubblewrap")
            raise ValueError(f"sandbox: {', '.join(missing)} cannot be found; {install}, {_OTHERWISE}")
        for path in settings.read_only:
            if not Path(path).is_dir():
                raise ValueError(f"sandbox.read_only: {path} is not a directory")
        usage = subprocess.run([self._found["bwrap"], "--help"], capture_output=True, text=True, timeout=60)
        self._has_size = "--size" in usage.stdout  # since 0.7. Before, only the watcher limits files
        self._filter = filter_program()
        self._settings = settings
        # A program can read bubblewrap's environment in /proc/1/environ, so it is empty. mount needs a PATH.
        self._environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} if self._is_root else {}
        prefixes = toolchains.prefixes()
        self._path = ":".join([*(f"{prefix}/bin" for prefix in prefixes), "/usr/local/bin:/usr/bin:/bin"])
        self._tools = [path for prefix in prefixes for path in toolchains.directories(prefix)]
        self._packages = [path for path in site.getsitepackages([sys.base_prefix]) if Path(path).is_dir()]
        self._outside = list(dict.fromkeys([*self._tools, *settings.read_only]))

    @contextlib.contextmanager
    def start(
        self, files: Mapping[str, bytes], command: Sequence[str], limits: Limits
    ) -> Iterator[BubblewrapProgram]:
        """Start a program, whose files have no name on the host."""
        with contextlib.ExitStack() as stack:
            handed: list[int] = []

            def hand(content: bytes) -> str:
                handed.append(_in_memory(content))
                stack.callback(os.close, handed[-1])
                return str(handed[-1])

            status, writer = os.pipe()
            reader = stack.enter_context(open(status, "rb"))
            with open(writer, "wb"):
                prlimit = self._found["prlimit"]
                words = [*self._unprivileged(), prlimit, *of_each_process(limits), "--", self._found["bwrap"]]
                words += ["--json-status-fd", str(writer), "--seccomp", hand(self._filter)]
                words += [*self._isolated(limits), *self._own(limits), *self._host()]
                for path in self._settings.read_only:
                    words += ["--ro-bind", self._reachable(path), path]
                for name, text in _NAMES.items():
                    words += ["--file", hand(text.encode()), f"/etc/{name}"]
                for name, content in files.items():
                    words += ["--file", hand(content), f"{WORK}/{name}"]
                words += ["--remount-ro", "/", "--chdir", WORK, "--"]
                words += [prlimit, *inside_a_namespace(limits), "--"]
                process = subprocess.Popen(
                    [*words, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=self._environment,
                    pass_fds=[writer, *handed],
                    start_new_session=True,
                )
            program = BubblewrapProgram(process, reader)
            stack.callback(program.close)
            yield program

    def _unprivileged(self) -> list[str]:
        """If this process is root, the command that gives up root's rights.

        A process of root could change the kernel's settings in /proc, and the kernel does not limit the
        number of root's processes.
        """
        if not self._is_root:
            return []
        words = []
        if self._outside:
            words = [self._found["unshare"], "--mount", "--propagation", "private", "sh", "-c", _MOUNT]
            words += ["sh", _REACHABLE, *self._outside, "--"]
        user = [f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups"]
        return [*words, self._found["setpriv"], *user, "--"]

    def _reachable(self, path: str) -> str:
        return f"{_REACHABLE}/{self._outside.index(path)}" if self._is_root else path

    def _isolated(self, limits: Limits) -> list[str]:
        variables = {
            "PATH": self._path, "HOME": WORK, "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MEMORY_MIB": str(limits.memory_mib),
            **self._settings.environment,
        }  # fmt: skip
        words = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        words += ["--uid", _USER, "--gid", _USER, "--hostname", "sandbox"]
        return words + [word for item in variables.items() for word in ("--setenv", *item)]

    def _own(self, limits: Limits) -> list[str]:
        """Options that mount /proc of the program's own processes, and the one place where it can write.

        Process 1 is bubblewrap's. Its directory in /proc is hidden, because it has the program's rights and
        parts of the files in its memory.
        """
        size = ["--size", str(limits.disk_mib * MIB)] if self._has_size else []
        words = ["--proc", "/proc", "--tmpfs", "/proc/1", "--remount-ro", "/proc/1", "--remount-ro", "/proc"]
        words += [*size, "--tmpfs", "/tmp", "--dir", WORK]
        links = {"shm": "/tmp", "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
        return words + [word for name, path in links.items() for word in ("--symlink", path, f"/dev/{name}")]

    def _host(self) -> list[str]:
        """Options that mount parts of the host.

        The host's Python packages are hidden, so that a program finds the same packages on every host.
        """
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


def _is_root() -> bool:
    """Whether this process is root of the machine, and not only root in a container with its own users."""
    first = Path("/proc/self/uid_map").read_text().split()[:2]
    return os.getuid() == 0 and first == ["0", "0"]


def _in_memory(content: bytes) -> int:
    """The descriptor of a file that has this content and no name."""
    descriptor = os.memfd_create("sandbox")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
