"""Whether two mathematical answers are the same, by `math-verify` in processes that can be killed."""

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
    "unreadable",  # one of them is no mathematics
    "too long",
    "timeout",
    "crashed",  # the process that compared them died, at its limit of memory or for another reason
]
_WORKER = Path(__file__).with_name("answers_worker.py")
_RULES = 2  # raise it when the worker compares otherwise: what is in a journal is then compared again
_LONGEST = 1000  # characters of an answer
_START = 120.0  # seconds, by the clock, until a process is ready
_PATIENCE = 60.0  # seconds, by the clock, for a comparison. Its processor time is limited by the worker
_VARIABLES = ("PATH", "PYTHONPATH", "LANG", "LD_LIBRARY_PATH")  # that a worker has of this process


class BrokenComparison(ValueError):
    """math-verify does not work at all."""


class MathAnswers:
    """Compares answers, each pair once: what came of it is kept in the journal, and replayed."""

    def __init__(self, journal: Journal, *, processes: int | None = None, seconds: int = 5) -> None:
        """processes: by default one for each core. seconds: of processor time, for one comparison.

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
        """How `given` compares with `wanted`, and the key in the journal, which equal texts do not need.

        Both are the content of `\\boxed{...}`. Raises `BrokenComparison`.
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
    """A process of `answers_worker`, which starts when it is needed, and again after it was killed."""

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self._process: asyncio.subprocess.Process | None = None

    async def compare(self, wanted: str, given: str) -> Comparison:
        if self._process is None:
            await self._start()
        try:
            async with asyncio.timeout(_PATIENCE):
                answer = await self._answer(json.dumps([wanted, given]).encode() + b"\n")
                if not answer:  # it has ended
                    return await self._why_it_ended()
        except TimeoutError:
            await self.stop()
            return "timeout"
        except BaseException:  # it would answer the next comparison with this one's result
            await self.stop()
            raise
        assert answer in get_args(Comparison), answer
        return answer  # type: ignore[return-value]

    async def _why_it_ended(self) -> Comparison:
        # a process that has ended must not be killed: `kill` would take its exit status from asyncio
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
        except OSError as error:  # of the system's limits
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
        """The next line of output, empty if the process has ended."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(line)
            await process.stdin.drain()
        return (await process.stdout.readline()).decode().strip()
