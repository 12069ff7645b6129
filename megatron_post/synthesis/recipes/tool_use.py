"""Requests that need tools, with the calls, their real outputs and the answer, in one step or several."""

from typing import Any

from pydantic import Field

from megatron_post.config.section import Name
from megatron_post.data.dialog import Message
from megatron_post.synthesis.columns import column
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task
from megatron_post.synthesis.tools.core import CoreSettings, Toolbox
from megatron_post.synthesis.tools.search import Index
from megatron_post.synthesis.tools.trajectory import Trajectory, asked_for, check_answer, trajectory

VERSION = 1
MODELS = ("author", "judge")
SANDBOX = True
_LEAST = 2  # calls of a dialog of several steps


class Settings(CoreSettings):
    text: Name = Field("text", description="column of the text that inspires a request")
    several: float = Field(
        0.5, ge=0, le=1, description="share of the requests that must need several calls, drawn at random"
    )


def prepare(settings: Settings) -> Index | None:
    """The index of the documents. Raises `ValueError` if they cannot be read."""
    return Index(settings.documents, bad=settings.bad_documents) if settings.documents else None


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    settings = task.settings
    text = column(row, settings.text, key="text")
    is_several = task.random.random() < settings.several
    needed = task.random.choice(settings.tools)
    others = [tool for tool in settings.tools if tool != needed and task.random.random() < 0.5]
    box = Toolbox(task, settings, (needed, *others))
    asked = task.prompt("write", text=text, tool=needed, offered=box.offered, several=is_several)
    request = asked_for(await task.ask("write", asked))
    prompt = task.prompt("solve", request=request, several=is_several, calls=settings.calls)
    found = await trajectory(task, box, prompt, settings)
    _check(found, needed, is_several)
    await check_answer(task, request, found.turns)
    return [
        Row(
            [Message("user", request), *found.turns],
            capability="tools",
            kind=("several steps" if is_several else "one step") + (", corrected" if found.failed else ""),
            tools=box.announced,
            extra={"called": found.tools},
            unique=request,
        )
    ]


def _check(found: Trajectory, needed: str, is_several: bool) -> None:
    """Raises `Dropped` if the calls are not those that the request was made for."""
    if needed not in found.tools:
        raise Dropped("the tool is not called that the request was made for")
    if is_several and found.calls < _LEAST:
        raise Dropped("the request takes fewer than two calls")
    if not is_several and found.calls > 1:
        raise Dropped("the request takes more than one call")
    if is_several and not found.has_reasoning:
        raise Dropped("there is no reasoning between the calls")
