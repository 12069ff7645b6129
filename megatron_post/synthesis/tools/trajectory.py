"""A dialog of a model and its tools, from the user's request to the answer."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_post.data.dialog import Message
from megatron_post.inference.model import Refused
from megatron_post.inference.request import Reply
from megatron_post.synthesis.judge import verdict
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.task import Task
from megatron_post.synthesis.tools.core import Toolbox, ToolSettings

_REQUEST = re.compile(r"<request>(.*?)</request>", re.DOTALL)
_NONE = "NONE"


@dataclass(frozen=True)
class Trajectory:
    """The messages after a request. Calls that failed are not trained.

    calls: that ran. failed: calls that did not.
    """

    turns: tuple[Message, ...]
    calls: int
    failed: int

    @property
    def tools(self) -> list[str]:
        """The tools whose calls ran, each once."""
        return list(dict.fromkeys(message.tool_calls[0].name for message in self._ran))

    @property
    def codes(self) -> list[str]:
        """The arguments of the calls that ran."""
        return [text for message in self._ran for text in message.tool_calls[0].parameters.values()]

    @property
    def _ran(self) -> list[Message]:
        return [message for message in self.turns if message.tool_calls and message.trained]

    @property
    def has_reasoning(self) -> bool:
        """Whether the model says something before each call after the first."""
        called = [message for message in self.turns if message.tool_calls]
        return all(message.text.strip() for message in called[1:])


async def trajectory(task: Task[Any], box: Toolbox, prompt: str, settings: ToolSettings) -> Trajectory:
    """Have the author answer a prompt with tools, under the step `solve`.

    Raises `Dropped` if a tool is called wrongly or too often, and if the answer is missing, cut off, or given
    after a call that failed. Raises `Refused`.
    """
    turns: list[Message] = []
    outputs: list[bool] = []
    for _ in range(settings.calls + settings.corrections + 1):
        reply = await _reply(task, [Message("user", prompt), *turns], box)
        if reply.finish not in ("stop", "tool_calls"):
            raise Dropped("a reply is cut off")
        if not reply.message.tool_calls:
            if _has_unread_call(reply):
                raise Dropped("the server has not read the call in a reply")
            if not outputs:
                raise Dropped("no tool is called")
            if not outputs[-1]:
                raise Dropped("the answer follows a call that does not run")
            if not reply.text.strip():
                raise Dropped("the answer is empty")
            return Trajectory((*turns, reply.message), sum(outputs), outputs.count(False))
        call = box.read(reply.message.tool_calls[0])
        output = await box.call(call)
        outputs.append(output.ok)
        task.count("call", f"{call.name} {'runs' if output.ok else 'does not run'}")
        if outputs.count(False) > settings.corrections:
            raise Dropped("a call does not run", output.text[-500:])
        if sum(outputs) > settings.calls:
            break
        turns += [
            replace(reply.message, tool_calls=(call,), trained=output.ok),
            Message("ipython", output.text),
        ]
    raise Dropped("tools are called too often")


async def _reply(task: Task[Any], messages: Sequence[Message], box: Toolbox) -> Reply:
    """The author's reply. Raises `Dropped` if it has calls that Llama 3's format cannot represent."""
    try:
        return await task.ask("solve", messages, tools=box.asked)
    except Refused as refused:
        if not refused.unusable:
            raise
        raise Dropped(
            "the reply has no text, wrong arguments of a call, or several calls", refused.reason
        ) from None


def _has_unread_call(reply: Reply) -> bool:
    """Whether the text of a reply is a call. A server without a parser of calls gives it as a text."""
    if reply.finish == "tool_calls":
        return True
    try:
        values = json.loads(reply.text)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {"name", "parameters"} <= values.keys()


def asked_for(reply: Reply) -> str:
    """The request of a user that a reply has in its tags. Raises `Dropped` if there is none, or several."""
    if reply.finish != "stop":
        raise Dropped("the request is cut off")
    if reply.text.strip() == _NONE:
        raise Dropped("nothing to ask for")
    found = [request.strip() for request in _REQUEST.findall(reply.text)]
    if len(found) != 1 or not found[0]:
        raise Dropped("the reply has no request, or several")
    return found[0]


async def check_answer(task: Task[Any], request: str, turns: Sequence[Message]) -> None:
    """Raises `Dropped` unless the judge finds that the outputs support the answer.

    Uses the prompt `judge`. Raises `Refused`.
    """
    outputs = [message.content for message in turns if message.role == "ipython"]
    prompt = task.prompt("judge", request=request, outputs=outputs, answer=turns[-1].content)
    if await verdict(task, "judge", prompt, ("supported", "unsupported")) != "supported":
        raise Dropped("the judge does not find the answer in the outputs")
