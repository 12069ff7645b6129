"""What passes share in a process: the models of the run with their journal, and a model that ranks labels."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from megatron_post.inference.answers import Answers, open_answers
from megatron_post.inference.journal import Journal
from megatron_post.inference.model import Model
from megatron_post.inference.settings import AskedModel

Item = TypeVar("Item")
Made = TypeVar("Made")


class Ranker(Protocol):
    """Ranks choices by log-probability, see `rounds.ranking.Ranker`."""

    @property
    def at_once(self) -> int: ...

    def fits(self, question: tuple[str, Sequence[str]]) -> bool: ...

    def rank(self, questions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]: ...


# Loads a model with overrides of its config. `rounds.ranking.open_ranker` is one. It is passed from above,
# because `rounds` imports this room.
OpenRanker = Callable[[str, Sequence[str]], contextlib.AbstractContextManager[Ranker]]


class Tools:
    """Opens the journal and each model when a pass first asks for it. It is a context manager."""

    def __init__(
        self,
        models: Mapping[str, AskedModel],
        *,
        journal: Path,
        writer: int,
        rows_in_flight: int,
        open_ranker: OpenRanker | None,
    ) -> None:
        """writer: number of this process, which has a file of its own in the journal."""
        self._models, self._directory, self._writer = models, journal, writer
        self._in_flight = rows_in_flight
        self._stack = contextlib.AsyncExitStack()
        self._journal: Journal | None = None
        self._answers: dict[str, Answers] = {}
        self._open_ranker = open_ranker
        self._rankers: dict[tuple[str, tuple[str, ...]], Ranker] = {}

    async def __aenter__(self) -> "Tools":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def model(self, name: str, *, scope: Sequence[str | int]) -> Model:
        """The model of this name in the run's settings.

        scope: the step's kind and version. Answers are only shared within a scope. Raises `ValueError` if
        the model cannot be opened, or if another process has this process's file of the journal.
        """
        found = self._models[name]
        own = next(other for other, model in self._models.items() if model == found)
        if self._journal is None:
            self._journal = self._stack.enter_context(Journal(self._directory, self._writer))
        if own not in self._answers:
            opened = open_answers(found.backend, found.model)
            self._answers[own] = await self._stack.enter_async_context(opened)
        return Model(
            self._answers[own], self._journal, name=found.model, scope=scope, sampling=found.sampling
        )

    def ranker(self, model: str, overrides: Sequence[str]) -> Ranker:
        """A model that ranks choices. Raises `ValueError` if it cannot be loaded."""
        assert self._open_ranker is not None, "the caller of `curate` must give open_ranker"
        key = (model, tuple(overrides))
        if key not in self._rankers:
            self._rankers[key] = self._stack.enter_context(self._open_ranker(model, overrides))
        return self._rankers[key]

    async def for_each(self, items: Sequence[Item], make: Callable[[Item], Awaitable[Made]]) -> list[Made]:
        """The results of `make` for all items, in order. As many run at once as `rows_in_flight` says."""
        limit = asyncio.Semaphore(self._in_flight)

        async def one(item: Item) -> Made:
            async with limit:
                return await make(item)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(item)) for item in items]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]
