"""Backends for callers that each wait for one answer, many of them at a time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from megatron_post.inference.backend import Backend, open_backend
from megatron_post.inference.model import Answers
from megatron_post.inference.request import Refusal, Reply, Request
from megatron_post.inference.settings import BackendSettings, ServerBackend

_MOST = 1024  # requests that an engine is given at a time; it divides them further


@contextlib.asynccontextmanager
async def open_answers(settings: BackendSettings, model: str) -> AsyncIterator[Answers]:
    """Open a backend. model: Hugging Face directory; with a server, a name for the record.

    Raises `ValueError` as `open_backend` does.
    """
    with contextlib.closing(open_backend(settings, model)) as backend:
        if isinstance(settings, ServerBackend):
            yield _Server(backend, settings.parallel_requests)
            return
        engine = _Engine(backend)
        working = asyncio.create_task(engine.work())
        try:
            yield engine
        finally:
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working


class _Server:
    def __init__(self, backend: Backend, parallel: int) -> None:
        self._backend, self._turn = backend, asyncio.Semaphore(parallel)

    async def answer(self, request: Request) -> Reply | Refusal:
        async with self._turn:
            return (await asyncio.to_thread(self._backend.respond, [request]))[0]


class _Engine:
    """An engine in this process. While it works on some requests, the next ones gather."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._waiting: list[tuple[Request, asyncio.Future[Reply | Refusal]]] = []
        self._some = asyncio.Event()

    async def answer(self, request: Request) -> Reply | Refusal:
        answer: asyncio.Future[Reply | Refusal] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        self._some.set()
        return await answer

    async def work(self) -> None:
        """Answer until this is cancelled."""
        while True:
            await self._some.wait()
            taken, self._waiting = self._waiting[:_MOST], self._waiting[_MOST:]
            if not self._waiting:
                self._some.clear()
            await self._answer([(request, answer) for request, answer in taken if not answer.done()])

    async def _answer(self, taken: Sequence[tuple[Request, "asyncio.Future[Reply | Refusal]"]]) -> None:
        try:
            replies = await asyncio.to_thread(self._backend.respond, [request for request, _ in taken])
        except Exception as error:
            for _, answer in taken:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), reply in zip(taken, replies, strict=True):
            if not answer.done():
                answer.set_result(reply)
