"""Compares mathematical answers with `math-verify`, in processes that can be killed."""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_post.inference.journal import Journal, key_of
from megatron_post.installation import install_command

Comparison = Literal[
    "same",
    "different",
    "unreadable",  # one of them is not a mathematical expression
    "too long",
    "timeout",
    "crashed",  # the process that compared them ended, at its memory limit or for another reason
]
_WORKER = Path(__file__).with_name("answers_worker.py")
_RULES = 2  # version of the worker's rules. A higher number compares the answers in a journal again
_LONGEST = 1000  # characters of an answer
_START = 120.0  # seconds of wall-clock time until a process is ready
_PATIENCE = 60.0  # seconds of wall-clock time for a comparison. The worker limits its processor time
_VARIABLES = ("PATH", "PYTHONPATH", "LANG", "LD_LIBRARY_PATH")  # variables that a worker inherits


class BrokenComparison(ValueError):
    """math-verify does not work at all."""


class MathAnswers:
    """Compares each pair of answers once. The journal keeps the result, which a replay uses."""

    def __init__(self, journal: Journal, *, processes: int | None = None, seconds: int = 5) -> None:
        """processes: by default one for each core. seconds: limit of processor time for one comparison.

        Raises `ValueError` if math-verify is not installed.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(f"comparing answers needs math-verify: {install_command('synthesize')}")
        self._journal, self._version = journal, metadata.version("math-verify")
        count = processes or len(os.sched_getaffinity(0))
        self._workers = [_Worker(seconds) for _ in range(count)]
        self._free: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        for worker in self._workers:
            self._free.put_nowait(worker)
        self.error: BrokenComparison | None = None

    async def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            await worker.stop()

    async def compare(self, wanted: str, given: str) -> tuple[Comparison, str]:
        """The result of comparing `given` with `wanted`, and the key of the journal entry.

        Both texts are the content of `\\boxed{...}`. The key is empty if the texts are equal or too long,
        because these have no entry. Raises `BrokenComparison`.
        """
        wanted, given = wanted.strip(), given.strip()
        if wanted == given:
            return "same", ""
        if max(len(wanted), len(given)) > _LONGEST:
            return "too long", ""
        key = key_of(math_verify=self._version, rules=_RULES, wanted=wanted, given=given)

        async def make() -> tuple[str, dict[str, Any]]:
            result = await self._compare(wanted, given)
            return "answer", {"wanted": wanted, "given": given, "result": result}

        return (await self._journal.once(key, make))["result"], key

    async def _compare(self, wanted: str, given: str) -> Comparison:
        worker = await self._free.get()
        try:
            return await worker.compare(wanted, given)
        except BrokenComparison as error:
            self.error = error
            raise
        finally:
            self._free.put_nowait(worker)


class _Worker:
    """A process of `answers_worker`. It starts when it is needed, and restarts after it was killed."""

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self._process: asyncio.subprocess.Process | None = None

    async def compare(self, wanted: str, given: str) -> Comparison:
        if self._process is None:
            await self._start()
        try:
            async with asyncio.timeout(_PATIENCE):
                answer = await self._answer(json.dumps([wanted, given]).encode() + b"\n")
                if not answer:  # the process has ended
                    return await self._why_it_ended()
        except TimeoutError:
            await self.stop()
            return "timeout"
        except BaseException:  # otherwise it would answer the next comparison with this one's result
            await self.stop()
            raise
        assert answer in get_args(Comparison), answer
        return answer  # type: ignore[return-value]

    async def _why_it_ended(self) -> Comparison:
        # A process that has ended must not be killed, because then asyncio would not get its exit status.
        assert self._process is not None
        status = await self._process.wait()
        self._process = None
        return "timeout" if status == -signal.SIGXCPU else "crashed"

    async def stop(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _start(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", str(_WORKER), str(self._seconds)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env={name: os.environ[name] for name in _VARIABLES if name in os.environ},
            )
        except OSError as error:  # such as a limit of the system
            raise BrokenComparison(f"a process that compares answers cannot be started: {error}") from error
        try:
            async with asyncio.timeout(_START):
                ready = await self._answer(b"")
        except TimeoutError:
            ready = ""
        except BaseException:
            await self.stop()
            raise
        if ready != "ready":
            await self.stop()
            raise BrokenComparison(
                "the process that compares answers does not start: "
                f"`{sys.executable} {_WORKER} {self._seconds}` shows why"
            )

    async def _answer(self, line: bytes) -> str:
        """Send a line. Returns the next line of output, which is empty if the process has ended."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(line)
            await process.stdin.drain()
        return (await process.stdout.readline()).decode().strip()
