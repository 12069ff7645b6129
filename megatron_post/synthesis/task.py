"""The task that a recipe receives. It gives access to the models, the sandbox and the prompts."""

import asyncio
import contextvars
import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from megatron_post.config.section import Section
from megatron_post.data.dialog import Message
from megatron_post.inference.model import Refused
from megatron_post.inference.request import Reply
from megatron_post.sandbox.outcome import Outcome
from megatron_post.sandbox.settings import Limits
from megatron_post.synthesis.inputs import InputRow
from megatron_post.synthesis.math.answers import Comparison
from megatron_post.synthesis.programs import Files
from megatron_post.synthesis.prompts import Prompts
from megatron_post.synthesis.resources import Resources
from megatron_post.synthesis.row import check_texts

_NO_STEP = "(before the first step)"
S = TypeVar("S", bound=Section)
T = TypeVar("T")


@dataclass
class Event:
    """A request, a program, a comparison, an output of a tool or a count of a recipe.

    model: empty except for requests. result: "reply", "refusal", the kind of a program's outcome, the result
    of a comparison, "output" of a tool, or what a recipe counts. key: key in the journal, which is empty
    until there is a result.
    """

    step: str
    model: str = ""
    result: str = ""
    key: str = ""
    prompt_tokens: int = 0
    tokens: int = 0


@dataclass
class _Branch:
    """Events of one asyncio task, `owner`, in their order."""

    owner: "asyncio.Task[Any] | None"
    events: list[Event] = field(default_factory=list)


class Task(Generic[S]):
    """What a recipe uses to process one input row.

    id, source: those of the input row. settings: the recipe's own. prepared: what the recipe's `prepare`
    returned, or None. random: a generator whose seed is the input row's id, so that its numbers are the same
    after a restart.
    """

    def __init__(self, row: InputRow, settings: S, prompts: Prompts, resources: Resources) -> None:
        self.id, self.source, self.settings = row.id, row.source, settings
        self.prepared: Any = resources.prepared
        self.random = random.Random(row.id)
        self._prompts, self._resources = prompts, resources
        root = _Branch(asyncio.current_task())
        self.events = root.events
        self.measures: list[tuple[str, float]] = []
        self._steps: dict[BaseException, str] = {}
        self._branch: contextvars.ContextVar[_Branch] = contextvars.ContextVar("branch", default=root)

    def prompt(self, name: str, **values: Any) -> str:
        """The prompt `NAME.j2` with these values."""
        return self._prompts.render(name, **values)

    async def ask(
        self,
        step: str,
        messages: str | Sequence[Message],
        *,
        model: str = "author",
        seed: int = 0,
        tools: Sequence[dict[str, Any]] = (),
        **sampling: Any,
    ) -> Reply:
        """Ask a model for a reply. A string is one message of the user. Another seed gives another reply.

        step: the name under which the report counts the request. If a prompt has this name, a higher version
        of the prompt sends the request again. model: a name under `models`. sampling: values for this request
        alone, such as `temperature=0.2`. Raises `Refused`, which drops the row unless the recipe handles it.
        """
        event = self._begin(step)
        event.model = model
        try:
            reply = await self._resources.model(model, step).ask(messages, seed=seed, tools=tools, **sampling)
        except Refused as refused:
            event.result, event.key = "refusal", refused.key
            raise
        event.result, event.key = "reply", reply.key
        event.prompt_tokens, event.tokens = reply.prompt_tokens, reply.tokens
        return reply

    async def run(
        self,
        step: str,
        files: Files,
        command: Sequence[str],
        limits: Limits | None = None,
    ) -> Outcome:
        """Run a program in the sandbox. Equal programs are run once, and the journal keeps the outcome.

        step: the name under which the report counts the outcome. limits: by default those of `sandbox`.
        """
        event = self._begin(step)
        outcome, event.key = await self._resources.sandbox().run(files, command, limits)
        event.result = outcome.kind
        return outcome

    async def compare(self, step: str, wanted: str, given: str) -> Comparison:
        """Compare two mathematical answers. Equal pairs are compared once, and the journal keeps the result.

        step: the name under which the report counts the result. wanted, given: texts as in `\\boxed{...}`.
        They may be hostile.
        """
        event = self._begin(step)
        event.result, event.key = await self._resources.answers().compare(wanted, given)
        return event.result

    async def use(self, step: str, tool: str, values: Mapping[str, Any], make: Callable[[], str]) -> str:
        """The output of a tool that runs in this process, such as a search. The journal keeps it.

        step: the name under which the report counts it. values: everything that the output depends on, as
        JSON. Equal values of a tool have the same output, which `make` gives once. It runs in another thread.
        """
        event = self._begin(step)
        output, event.key = await self._resources.output_of(tool, values, make)
        event.result = "output"
        return output

    def count(self, step: str, result: str) -> None:
        """Count a result under a step of the report, such as a judge's verdict."""
        check_texts(result=result)
        self._begin(step).result = result

    def measure(self, name: str, value: float) -> None:
        """Have the report show the mean and the distribution of a number, over the rows that are kept."""
        check_texts(name=name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise TypeError(f"{name} is measured as a number, and not as {value!r:.80}")
        self.measures.append((name, value))

    async def together(self, *work: Awaitable[T]) -> list[T]:
        """Run several awaitables concurrently, such as K samples. Returns their results in order.

        Once all have ended, this raises the first error in the order of `work`. `asyncio.gather` would raise
        the error that came first in time, so rows could differ between a run and its replay.
        """
        branches = [_Branch(None) for _ in work]

        async def within(branch: _Branch, one: Awaitable[T]) -> T:
            branch.owner = asyncio.current_task()
            self._branch.set(branch)
            return await one

        pairs = zip(branches, work, strict=True)
        results = await asyncio.gather(*(within(*pair) for pair in pairs), return_exceptions=True)
        events = self._branch.get().events
        for branch in branches:
            events += branch.events
        for branch, result in zip(branches, results, strict=True):
            if isinstance(result, BaseException):
                if branch.events:
                    self._steps.setdefault(result, branch.events[-1].step)
                raise result
        return results  # type: ignore[return-value]  # none is an error

    def step_of(self, error: BaseException) -> str:
        """The step at which a recipe raised an error. In `together`, other branches may be at later steps."""
        return self._steps.get(error) or (self.events[-1].step if self.events else _NO_STEP)

    def _begin(self, step: str) -> Event:
        branch = self._branch.get()
        if asyncio.current_task() is not branch.owner:
            raise RuntimeError(
                "a recipe does several things at a time with `task.together`, and not with asyncio's tasks: "
                "the order of its events would differ between a run and its replay"
            )
        check_texts(step=step)
        branch.events.append(event := Event(step))
        return event
