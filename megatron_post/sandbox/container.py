"""Runs programs with a site's container command, such as `apptainer exec` or `docker run`."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_post.sandbox import processes
from megatron_post.sandbox.kernel_limits import MIB, of_each_process
from megatron_post.sandbox.settings import Container, Limits
from megatron_post.sandbox.supervise import SECONDS_TO_END, BrokenSandbox

CANARY = "SANDBOX_CANARY"  # a variable of the container command that a program must not see
# Variables of this process that the container command gets.
_VARIABLES = ("PATH", "HOME", "USER", "TMPDIR", "XDG_RUNTIME_DIR", "DOCKER_HOST")
_ENTRY = 4096  # bytes that a file counts in addition to its content


class ContainerSandbox:
    """Starts programs with a container command. Raises `ValueError` if its first word is not a command."""

    remedy = "correct it, or set sandbox.kind=bubblewrap"

    def __init__(self, settings: Container) -> None:
        needed = {"command": settings.command[0], "stop": (settings.stop or settings.command)[0]}
        for key, name in {**needed, "kind=command": "prlimit"}.items():
            if shutil.which(name) is None:
                raise ValueError(f"sandbox.{key}: {name} cannot be found; {self.remedy}")
        self._settings = settings

    @contextlib.contextmanager
    def start(
        self, files: Mapping[str, bytes], command: Sequence[str], limits: Limits
    ) -> Iterator["ContainerProgram"]:
        """Start a program. Its files are in a new directory of the host, which is deleted at its end."""
        directory = Path(tempfile.mkdtemp(prefix="sandbox-")).resolve()
        try:
            for name, content in files.items():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                (directory / name).write_bytes(content)
            values = {
                "directory": str(directory),
                "name": f"sandbox-{uuid.uuid4().hex}",
                **limits.model_dump(include={"memory_mib", "processes", "disk_mib", "seconds"}),
            }
            kernel = [*of_each_process(limits), f"--nofile={limits.open_files}"]
            words = ["prlimit", *kernel, "--", *_filled(self._settings.command, values)]
            variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
            process = subprocess.Popen(
                [*words, "env", f"MEMORY_MIB={limits.memory_mib}", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**variables, CANARY: "1"},
                start_new_session=True,
            )
            stop = _filled(self._settings.stop or (), values)
            yield ContainerProgram(process, directory, limits, stop, variables)
        finally:
            _remove(directory)


class ContainerProgram:
    """A program that runs in a container."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        directory: Path,
        limits: Limits,
        stop: list[str],
        variables: dict[str, str],
    ) -> None:
        self.process = process
        self.root: int | None = process.pid
        self._directory, self._most = directory, limits.disk_mib * MIB
        self._stop, self._variables = stop, variables

    def disk_bytes(self) -> int:
        """Bytes that all files in the directory take. Counting stops at the limit."""
        size, folders = 0, [self._directory]
        for folder in folders:  # the list grows meanwhile
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    size += _ENTRY + entry.stat(follow_symlinks=False).st_blocks * 512
                    if size >= self._most:
                        return size
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
        return size

    def kill(self) -> None:
        """Kill the container command and all its descendants.

        The search is repeated, because processes may start others meanwhile.
        """
        deadline = time.monotonic() + SECONDS_TO_END
        while (below := processes.descendants(self.process.pid)) and time.monotonic() < deadline:
            for process in below:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.001)
            if self.process.poll() is not None:
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def finish(self, *, killed: bool) -> None:
        if not (killed and self._stop):
            return
        try:
            subprocess.run(
                self._stop,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=self._variables,
                timeout=SECONDS_TO_END,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BrokenSandbox(f"sandbox.stop failed: {error}") from error


def _filled(words: Sequence[str], values: Mapping[str, object]) -> list[str]:
    return [word.format(**values) for word in words]


def _remove(directory: Path) -> None:
    """Remove a directory, even if the program has made it unreadable.

    Raises `BrokenSandbox` if a file cannot be removed.
    """
    directory.chmod(0o700)
    for folder, names, _ in os.walk(directory):
        for name in names:  # `os.walk` enters them afterwards
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                with contextlib.suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        raise BrokenSandbox(
            f"the container's files in {directory} cannot be removed. Run the container as this user, "
            f"such as with docker run --user={os.getuid()}"
        )
