"""`open_sandbox` opens the sandbox that runs programs which a model wrote."""

import asyncio
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import PurePosixPath
from threading import Event
from typing import Protocol

from megatron_post.sandbox import container_check
from megatron_post.sandbox.bubblewrap import BubblewrapSandbox
from megatron_post.sandbox.container import ContainerSandbox
from megatron_post.sandbox.kernel_limits import MIB
from megatron_post.sandbox.languages import ALL_TOOLS, TOOLS, Language
from megatron_post.sandbox.outcome import Outcome
from megatron_post.sandbox.settings import Bubblewrap, Container, Limits
from megatron_post.sandbox.supervise import BrokenSandbox, Program, supervise

_MOST_PROGRAMS = 32  # by default, because watching more takes a large part of this process's time
_MOST_FILES = 256  # of one program. Each is an open file of this process until the program has started
_FIRST = Limits(seconds=600)  # for the first program, because a container's image may have to be fetched
_LONGEST_NAME = 255  # bytes of a file's name, with its directories
_LONGEST_WORD = 100_000  # bytes. The limit of Linux is 131,072
_BLOCK = 4096  # bytes. A tmpfs stores the name and the content of a file in whole blocks
_PROBE = 'for name in "$@"; do if command -v "$name" >/dev/null; then echo "$name"; fi; done'


class _Starter(Protocol):
    remedy: str  # what to do if the first program does not run

    def start(
        self, files: Mapping[str, bytes], command: Sequence[str], limits: Limits
    ) -> AbstractContextManager[Program]: ...


class Sandbox:
    """Runs a bounded number of programs at a time. It is a context manager that ends its threads."""

    def __init__(self, settings: Bubblewrap | Container) -> None:
        self.limits = settings.limits
        self._starter: _Starter
        if isinstance(settings, Bubblewrap):
            self._starter = BubblewrapSandbox(settings)
        else:
            self._starter = ContainerSandbox(settings)
        # The kernel kills bubblewrap when the thread that started it ends, so a thread watches its program.
        self._pool = ThreadPoolExecutor(settings.programs or _default_programs(), "sandbox")
        self.tools = frozenset(self._first(["sh", "-c", _PROBE, "sh", *ALL_TOOLS]).split())
        if isinstance(settings, Container):
            self._check_container()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    async def run(
        self, files: Mapping[str, str | bytes], command: Sequence[str], limits: Limits | None = None
    ) -> Outcome:
        """Run `command` beside `files` in a new directory, which is deleted afterwards.

        files: content by name, which may have directories. limits: by default those of the settings. If this
        is cancelled, the program is killed first. Raises `ValueError` before anything runs if a name leads
        out of the directory, or if the files are larger than the disk. Raises `BrokenSandbox` if the sandbox
        fails.
        """
        limits = limits or self.limits
        content = _checked(files, limits)
        _checked_command(command)
        cancelled = Event()
        job = self._pool.submit(self._run, content, command, limits, cancelled)
        waiting = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            cancelled.set()
            if not job.cancel():
                await asyncio.gather(waiting, return_exceptions=True)
            raise

    def missing(self, language: Language) -> list[str]:
        """The tools of a language that are not in the sandbox."""
        return [name for name in TOOLS[language] if name not in self.tools]

    def _run(
        self, files: Mapping[str, bytes], command: Sequence[str], limits: Limits, cancelled: Event
    ) -> Outcome:
        try:
            with self._starter.start(files, command, limits) as program:
                return supervise(program, limits, cancelled)
        except OSError as error:  # this process has too many open files or the like
            raise BrokenSandbox(f"a program could not be started: {error}") from error

    def _first(self, command: Sequence[str]) -> str:
        """The output of a first program. Raises `ValueError` if it does not run."""
        try:
            outcome = self._run({}, command, _FIRST, Event())
        except BrokenSandbox as error:
            raise ValueError(f"the sandbox does not work: {error}; {self._starter.remedy}") from error
        if not outcome.ok:
            raise ValueError(
                f"the sandbox does not work: a first program ended as {outcome.kind} with exit status "
                f"{outcome.returncode}: {' '.join(outcome.stderr.split())[-500:]}; {self._starter.remedy}"
            )
        return outcome.stdout

    def _check_container(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            printed = self._first(container_check.command(directory))
        if found := container_check.faults(printed):
            raise ValueError(
                f"sandbox.command does not isolate programs: a program in it {'. It '.join(found)}"
            )


def open_sandbox(settings: Bubblewrap | Container) -> Sandbox:
    """A sandbox that has run a first program.

    Raises `ValueError`, which says what to install, if the first program does not run.
    """
    return Sandbox(settings)


def _default_programs() -> int:
    return min(_MOST_PROGRAMS, len(os.sched_getaffinity(0)))


def _checked(files: Mapping[str, str | bytes], limits: Limits) -> dict[str, bytes]:
    """Files as bytes. Raises `ValueError` for names outside their directory, and if they are too large."""
    if len(files) > _MOST_FILES:
        raise ValueError(f"a program has {len(files)} files, and at most {_MOST_FILES} are allowed")
    content: dict[str, bytes] = {}
    for name, text in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or name == ".":
            raise ValueError(f"{name!r} is not the name of a file in the program's directory")
        encoded = name.encode(errors="replace")
        if not name.isprintable() or len(encoded) > _LONGEST_NAME:
            raise ValueError(
                f"{name!r} is not the name of a file, because it has more than {_LONGEST_NAME} bytes or "
                "characters that cannot be printed"
            )
        content[name] = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    for name in content:
        if inside := [str(parent) for parent in PurePosixPath(name).parents if str(parent) in content]:
            raise ValueError(f"{inside[0]!r} is a file and cannot be the directory of {name!r}")
    size = sum(len(text) + 3 * _BLOCK for text in content.values())
    if size > limits.disk_mib * MIB:
        raise ValueError(f"a program's files take {size} bytes, and limits.disk_mib is {limits.disk_mib}")
    return content


def _checked_command(command: Sequence[str]) -> None:
    if isinstance(command, str) or not command or not command[0]:
        raise ValueError(f"{command!r} is not a command. Write a list of words")
    for word in command:
        if "\0" in word or len(word.encode(errors="surrogatepass")) > _LONGEST_WORD:
            raise ValueError(
                f"a word of a command has a null character in it or more than {_LONGEST_WORD} bytes: "
                f"{word[:60]!r}. Write long text into a file"
            )
