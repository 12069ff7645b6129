"""What answers single requests of many callers: a server, or a model that this process holds."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from megatron_post.inference.backend import Backend, open_backend
from megatron_post.inference.request import Refusal, Reply, Request
from megatron_post.inference.server import Server
from megatron_post.inference.settings import BackendSettings, ServerBackend

_MOST = 1024  # requests that a backend is given at a time


class Answers(Protocol):
    """Raises `ValueError` if it does not work at all, which is no fault of the request."""

    async def answer(self, request: Request) -> Reply | Refusal: ...


@contextlib.asynccontextmanager
async def open_answers(
    settings: BackendSettings, model: str, content_tokens: Sequence[str] = ()
) -> AsyncIterator[Answers]:
    """model, content_tokens: as `open_backend` takes them, and not used for a server. Raises as it does."""
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
    """Gives a backend all requests that have come while it answered the ones before."""

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
            batch = [each for each in taken if not each[1].done()]  # a caller may have left
            try:
                answers = await asyncio.to_thread(self._backend.respond, [request for request, _ in batch])
            except Exception as error:  # it is raised where each of them was asked
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), answer in zip(batch, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)
