"""Requests to a model and its replies."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, model_validator

from megatron_post.config.consistency import Needs, without_effect
from megatron_post.config.section import Count, NonNegative, Section
from megatron_post.data.dialog import Message, ToolCall
from megatron_post.data.special_tokens import END_OF_MESSAGE, END_OF_TEXT, END_OF_TURN

_ROLES = {"ipython": "tool"}  # OpenAI's name of a role, if it differs from the name here


class Sampling(Section):
    """How a response is sampled."""

    temperature: NonNegative = Field(1.0, description="temperature. 0: always the most probable token")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the most probable tokens with this total probability"
    )
    max_tokens: Count = Field(512, description="largest number of tokens in a response")
    stop: tuple[str, ...] = Field(
        (END_OF_TURN, END_OF_MESSAGE, END_OF_TEXT), min_length=1, description="tokens that end a response"
    )

    @model_validator(mode="after")
    def _has_effect(self) -> "Sampling":
        if errors := without_effect(self, (Needs("top_p", "temperature", above=0),)):
            raise ValueError("\n".join(errors))
        return self


@dataclass(frozen=True)
class Request:
    """A request for one response. seed: only for this response. tools: functions in OpenAI's form.

    Raises `ValueError` if the messages do not end with a user message or a tool's output, and for a seed that
    is no integer.
    """

    messages: tuple[Message, ...]
    sampling: Sampling
    seed: int
    tools: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1].role not in ("user", "ipython"):
            last = self.messages[-1].role if self.messages else "nobody"
            raise ValueError(
                f"a model is asked by the user or a tool's output, and the last message is from {last}"
            )
        if type(self.seed) is not int:
            raise ValueError(f"seed={self.seed!r}: a seed is an integer")

    def as_json(self) -> dict[str, Any]:
        """Everything that the answer depends on, except for the model."""
        values: dict[str, Any] = {
            "messages": messages_as_json(self.messages),
            "sampling": self.sampling.model_dump(mode="json"),
            "seed": self.seed,
        }
        if self.tools:
            values["tools"] = list(self.tools)
        # A turn usually continues after a tool call and nowhere else. OpenAI's messages cannot say otherwise.
        unusual = [
            number
            for number, message in enumerate(self.messages)
            if message.role == "assistant" and message.end_of_turn == bool(message.tool_calls)
        ]
        if unusual:
            values["unusual_ends_of_turn"] = unusual
        return values


@dataclass(frozen=True)
class Reply:
    """A model's answer.

    finish: the reason why it ended in the terms of OpenAI's protocol, such as "stop", "length" or
    "tool_calls".
    tokens: those of the answer, including its stop token. prompt_tokens: those of the request, or 0 if they
    are unknown. key: its key in the journal.
    """

    message: Message
    finish: str
    tokens: int
    prompt_tokens: int = 0
    key: str = field(default="", compare=False)

    @property
    def text(self) -> str:
        """The message without its reasoning and tool calls."""
        return self.message.content

    def as_json(self) -> dict[str, Any]:
        return {
            "message": messages_as_json([self.message])[0],
            "finish": self.finish,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
        }


@dataclass(frozen=True)
class Refusal:
    """The reason why a request is refused or too long. Other requests may still be answered.

    unusable: the model has replied, but not in a form that can be used, such as several calls in a message.
    """

    reason: str
    unusable: bool = False


def reply_from_json(values: Mapping[str, Any], key: str = "") -> Reply:
    """The reply in values of `Reply.as_json`. key: its key in the journal."""
    message, finish = values["message"], values["finish"]
    return Reply(
        assistant_message(
            message["content"],
            calls=[ToolCall(**call["function"]) for call in message.get("tool_calls", ())],
            reasoning=message.get("reasoning_content", ""),
            finish=finish,
        ),
        finish,
        values["tokens"],
        values["prompt_tokens"],
        key,
    )


def assistant_message(
    content: str, *, calls: Sequence[ToolCall] = (), reasoning: str = "", finish: str = "stop"
) -> Message:
    """The message of a reply. The turn continues after a tool call.

    Raises `BadRow` for calls that Llama 3's format cannot represent.
    """
    ends = not calls and finish != "tool_calls"
    return Message("assistant", content, tuple(calls), end_of_turn=ends, reasoning=reasoning)


def messages_as_json(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the form of OpenAI's protocol and of datasets.

    The id of a call and its output follows from their position. Several calls in a row are answered in order.
    """
    found: list[dict[str, Any]] = []
    waiting: list[str] = []  # the ids of calls without an output, or of the last call
    for number, message in enumerate(messages, start=1):
        values: dict[str, Any] = {
            "role": _ROLES.get(message.role, message.role),
            "content": message.content,
        }
        if message.reasoning:
            values["reasoning_content"] = message.reasoning
        if message.tool_calls:
            is_parallel = bool(found) and "tool_calls" in found[-1]
            waiting = [*(waiting if is_parallel else ()), f"call_{number}"]
            values["tool_calls"] = [_call_as_json(call, waiting[-1]) for call in message.tool_calls]
        if message.role == "ipython" and waiting:
            values["tool_call_id"] = waiting[0]
            waiting = waiting[1:] or waiting
        found.append(values)
    return found


def _call_as_json(call: ToolCall, call_id: str) -> dict[str, Any]:
    arguments = call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments)
    return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
