"""What a recipe works with: one input row, the models, the sandbox and the prompts."""

import asyncio
import contextvars
import random
from collections.abc import Awaitable, Sequence
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
    """A request or a program of a recipe. key: the journal's; empty as long as it has no answer.

    result: "reply", "refusal", the kind of a program's outcome, how two answers compare, or what a recipe
    counts. model: empty for all but requests.
    """

    step: str
    model: str = ""
    result: str = ""
    key: str = ""
    prompt_tokens: int = 0
    tokens: int = 0


@dataclass
class _Branch:
    """Events of one line of work, which `owner` does one after the other."""

    owner: "asyncio.Task[Any] | None"
    events: list[Event] = field(default_factory=list)


class Task(Generic[S]):
    """One input row's way through a recipe.

    id, source: of the input row. settings: the recipe's own. random: numbers that follow from the input row's
    id, and are the same after a restart.
    """

    def __init__(self, row: InputRow, settings: S, prompts: Prompts, resources: Resources) -> None:
        self.id, self.source, self.settings = row.id, row.source, settings
        self.random = random.Random(row.id)
        self._prompts, self._resources = prompts, resources
        root = _Branch(asyncio.current_task())
        self.events = root.events
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
        """A model's reply. A text is one message of the user. Another seed asks for another reply.

        step: what the report counts it under. If a prompt has the same name, a higher version of it asks
        again. model: a name under `models`. sampling: such as `temperature=0.2`, for this request alone.
        Raises `Refused`, which drops the row unless the recipe handles it.
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
        """Run a program in the sandbox. The same program is run once, and its outcome is kept.

        step: what the report counts it under. limits: by default those of `sandbox`.
        """
        event = self._begin(step)
        outcome, event.key = await self._resources.sandbox().run(files, command, limits)
        event.result = outcome.kind
        return outcome

    async def compare(self, step: str, wanted: str, given: str) -> Comparison:
        """Whether two mathematical answers are the same. What comes of a pair is kept.

        step: what the report counts it under. The texts are as in `\\boxed{...}`. They may be hostile.
        """
        event = self._begin(step)
        event.result, event.key = await self._resources.answers().compare(wanted, given)
        return event.result

    def count(self, step: str, result: str) -> None:
        """Have the report count a result of the recipe's own, such as a judge's verdict, under a step."""
        check_texts(result=result)
        self._begin(step).result = result

    async def together(self, *work: Awaitable[T]) -> list[T]:
        """Do several things at a time, such as K samples, and wait for all. Returns their results in order.

        Raises the first error, in the order of `work`, once all have ended. `asyncio.gather` would raise the
        one that came first in time, and rows would differ between a run and its replay.
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
        """The step at which a recipe has raised an error. In `together`, others may have gone further."""
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
