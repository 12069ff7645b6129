"""A site's container command, such as `apptainer exec` or `docker run`."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_post.sandbox import processes
from megatron_post.sandbox.settings import Container, Limits
from megatron_post.sandbox.supervise import MIB, SECONDS_TO_END

# of this process, for the container command itself; whether a program sees them is the container's matter
_VARIABLES = ("PATH", "HOME", "USER", "TMPDIR", "XDG_RUNTIME_DIR", "DOCKER_HOST")
_ENTRY = 4096  # bytes that a file counts beside its content


class ContainerSandbox:
    """Starts programs by a container command. Raises `ValueError` where its first word is no command."""

    remedy = "correct sandbox.command, or set sandbox.kind=bubblewrap"

    def __init__(self, settings: Container) -> None:
        for key, words in (("command", settings.command), ("stop", settings.stop or ())):
            if words and shutil.which(words[0]) is None:
                raise ValueError(f"sandbox.{key}: {words[0]} cannot be found; {self.remedy}")
        self._settings = settings

    @contextlib.contextmanager
    def start(
        self, files: Mapping[str, bytes], command: Sequence[str], limits: Limits
    ) -> Iterator["ContainerProgram"]:
        """A program that runs. Its files are in a new directory of the host, which goes with it."""
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
            variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
            process = subprocess.Popen(
                [
                    *_filled(self._settings.command, values),
                    "env",
                    f"MEMORY_MIB={limits.memory_mib}",
                    *command,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=variables,
                start_new_session=True,
            )
            stop = _filled(self._settings.stop or (), values)
            yield ContainerProgram(process, directory, stop, variables, limits)
        finally:
            _remove(directory)


class ContainerProgram:
    """A program that runs in a container."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        directory: Path,
        stop: list[str],
        variables: dict[str, str],
        limits: Limits,
    ) -> None:
        self.process = process
        self.root: int | None = process.pid
        self._directory, self._stop, self._variables = directory, stop, variables
        self._most = limits.disk_mib * MIB

    def disk_bytes(self) -> int:
        """Of all files in the directory. Counting ends at the limit."""
        size, folders = 0, [self._directory]
        for folder in folders:  # grows
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    size += _ENTRY + found.st_blocks * 512
                    if size >= self._most:
                        return size
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
        return size

    def kill(self) -> None:
        below = processes.descendants(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in below:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)

    def finish(self, *, killed: bool) -> None:
        if killed and self._stop:
            subprocess.run(
                self._stop,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=self._variables,
                timeout=SECONDS_TO_END,
                check=False,
            )


def _filled(words: Sequence[str], values: Mapping[str, object]) -> list[str]:
    return [word.format(**values) for word in words]


def _remove(directory: Path) -> None:
    """Also directories that the program has made unreadable."""

    def unlock(_function: object, path: str, _error: object) -> None:
        with contextlib.suppress(OSError):
            os.chmod(os.path.dirname(path), 0o700)
            os.chmod(path, 0o700, follow_symlinks=False) if not os.path.islink(path) else None
            os.unlink(path) if not os.path.isdir(path) else shutil.rmtree(path, ignore_errors=True)

    shutil.rmtree(directory, onerror=unlock)
