"""Answers single requests of many callers, with a server or with a model in this process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from megatron_post.inference.backend import Backend, open_backend
from megatron_post.inference.request import Refusal, Reply, Request
from megatron_post.inference.server import Server
from megatron_post.inference.settings import BackendSettings, ServerBackend

_MOST = 1024  # the largest number of requests that a backend gets at once


class Answers(Protocol):
    """Answers requests. Raises `ValueError` if it does not work at all, independently of the request."""

    async def answer(self, request: Request) -> Reply | Refusal: ...


@contextlib.asynccontextmanager
async def open_answers(
    settings: BackendSettings, model: str, content_tokens: Sequence[str] = ()
) -> AsyncIterator[Answers]:
    """Open a server or a model in this process.

    model, content_tokens: as in `open_backend`, and not used for a server. Raises as `open_backend` does.
    """
    if isinstance(settings, ServerBackend):
        async with Server(settings) as server:
            yield server
    else:
        with contextlib.closing(open_backend(settings, model, content_tokens)) as backend:
            batches = Batches(backend)
            try:
                yield batches
            finally:
                await batches.end()


class Batches:
    """Gives a backend batches of requests. A batch has all requests that arrived during the previous one."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._waiting: list[tuple[Request, asyncio.Future[Reply | Refusal]]] = []
        self._working: asyncio.Task[None] | None = None

    async def answer(self, request: Request) -> Reply | Refusal:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await future

    async def end(self) -> None:
        """Wait for the batch that the backend is working on."""
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
        if self._working is not None:
            await self._working

    async def _work(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting[:_MOST], self._waiting[_MOST:]
            batch = [each for each in taken if not each[1].done()]  # a caller may have been cancelled
            try:
                answers = await asyncio.to_thread(self._backend.respond, [request for request, _ in batch])
            except Exception as error:  # every caller of the batch gets the error
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), answer in zip(batch, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)
