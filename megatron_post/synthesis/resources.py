"""The journal, models, sandbox and comparison of answers that all rows of a process share."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_post.inference.answers import Answers, open_answers
from megatron_post.inference.journal import Journal, key_of
from megatron_post.inference.model import Model
from megatron_post.inference.request import Refusal, Reply, Request
from megatron_post.sandbox.sandbox import open_sandbox
from megatron_post.synthesis.math.answers import MathAnswers
from megatron_post.synthesis.programs import JournalledSandbox
from megatron_post.synthesis.progress import Spent
from megatron_post.synthesis.recipe import Prepared, Recipe
from megatron_post.synthesis.settings import Synthesis


class _Watched:
    """A backend that stores its error, so that a recipe cannot catch the error and drop the row instead."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self.error: Exception | None = None

    async def answer(self, request: Request) -> Reply | Refusal:
        try:
            return await self._answers.answer(request)
        except Exception as error:
            self.error = error
            raise


class Resources:
    """Gives tasks their models, their sandbox and the comparison of answers. All of them use one journal."""

    def __init__(
        self,
        settings: Synthesis,
        recipe: Recipe,
        prepared: Prepared | None,
        journal: Journal,
        answers: dict[str, Answers],
        sandbox: JournalledSandbox | None,
        compares: MathAnswers | None,
    ) -> None:
        """answers: a backend for each different model. Names of equal models share one."""
        self._settings, self._recipe, self._journal = settings, recipe, journal
        self.prepared = prepared
        self._answers = {name: _Watched(each) for name, each in answers.items()}
        self._sandbox, self._compares = sandbox, compares
        self._models: dict[tuple[str, int | None], Model] = {}

    def model(self, name: str, step: str) -> Model:
        """The model for the requests of a step.

        If a prompt has the name of the step, its version is a part of the journal's keys. Raises `ValueError`
        for a model that the recipe does not list in MODELS.
        """
        if name not in self._recipe.models:
            raise ValueError(f"recipe {self._recipe.name} asks {name!r}, which is not in its MODELS")
        own, version = self._settings.own_name(name), self._recipe.prompts.versions.get(step)
        if (own, version) not in self._models:
            found = self._settings.models[own]
            scope: list[str | int] = [self._recipe.name, self._recipe.version]
            scope += [] if version is None else [version]
            self._models[own, version] = Model(
                self._answers[own], self._journal, name=found.model, scope=scope, sampling=found.sampling
            )
        return self._models[own, version]

    def sandbox(self) -> JournalledSandbox:
        """The sandbox. Raises `ValueError` if the recipe does not set SANDBOX."""
        if self._sandbox is None:
            raise ValueError(f"recipe {self._recipe.name} runs programs: it needs SANDBOX = True")
        return self._sandbox

    def answers(self) -> MathAnswers:
        """The comparison of answers. Raises `ValueError` if the recipe does not set ANSWERS."""
        if self._compares is None:
            raise ValueError(f"recipe {self._recipe.name} compares answers: it needs ANSWERS = True")
        return self._compares

    async def output_of(
        self, tool: str, values: Mapping[str, Any], make: Callable[[], str]
    ) -> tuple[str, str]:
        """The output of a tool of the recipe, and its key in the journal. See `Task.use`."""
        key = key_of(tool=tool, values=dict(values))

        async def once() -> tuple[str, dict[str, Any]]:
            return "tool", {"tool": tool, "values": dict(values), "output": await asyncio.to_thread(make)}

        return (await self._journal.once(key, once))["output"], key

    def spent(self) -> Spent:
        """Requests and tokens of this process so far."""
        usages = [model.usage for model in self._models.values()]
        return Spent(
            sum(usage.asked for usage in usages),
            sum(usage.prompt_tokens for usage in usages),
            sum(usage.tokens for usage in usages),
        )

    def raise_if_broken(self) -> None:
        """Raise the error of a backend, sandbox or comparison that does not work. It ends the run."""
        errors = [watched.error for watched in self._answers.values()]
        errors += [each.error for each in (self._sandbox, self._compares) if each is not None]
        if error := next(filter(None, errors), None):
            raise error


@contextlib.asynccontextmanager
async def open_resources(
    settings: Synthesis, recipe: Recipe, prepared: Prepared | None, *, writer: int
) -> AsyncIterator[Resources]:
    """Open the journal as this writer, the backends of the recipe's models, and the sandbox.

    Raises `ValueError` if another process writes this journal, or if a backend or the sandbox cannot be
    opened.
    """
    async with contextlib.AsyncExitStack() as stack:
        journal = stack.enter_context(Journal(Path(settings.output) / "journal", writer))
        answers: dict[str, Answers] = {}
        for name in dict.fromkeys(map(settings.own_name, recipe.models)):
            found = settings.models[name]
            answers[name] = await stack.enter_async_context(open_answers(found.backend, found.model))
        sandbox = None
        if recipe.runs_programs:
            opened = stack.enter_context(open_sandbox(settings.sandbox))
            sandbox = JournalledSandbox(opened, settings.sandbox, journal)
        compares = None
        if recipe.compares_answers:
            compares = MathAnswers(journal)
            stack.push_async_callback(compares.close)
        yield Resources(settings, recipe, prepared, journal, answers, sandbox, compares)
