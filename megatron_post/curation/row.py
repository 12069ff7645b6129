"""A row with its texts: how steps read and rewrite it, and how it is written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from megatron_post.data.dialog import Dialog, Message, Preference
from megatron_post.inference.request import messages_as_json

ANNOTATIONS = "curation"  # the key of a written row that has its annotations
_RESPONSES = {2: ("chosen", "rejected"), 3: ("edited", "chosen", "rejected")}
OWN_KEYS = ("messages", "prompt", *_RESPONSES[3], "rating", "tools", ANNOTATIONS)  # of a written row


@dataclass(frozen=True)
class Row:
    """A good row.

    id: 16 bytes. values: the row as it is in its source. example: what `data pack` would make of it, with the
    texts that earlier steps have rewritten. extra: the keys of `values` that the format does not use.
    """

    id: bytes
    source: str
    number: int
    place: str
    values: Mapping[str, Any]
    example: Dialog | Preference
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The dialog. That of a preference is its prompt with the best response."""
        example = self.example
        return example.messages if isinstance(example, Dialog) else (*example.prompt, *example.responses[0])

    @property
    def texts(self) -> list[str]:
        """The content of every message and then its reasoning, if it has any, as `REWRITTEN` has them.

        A preference has all its responses.
        """
        return [text for message in all_messages(self.example) for text in _parts(message)]

    @property
    def roles(self) -> list[str]:
        """The role of each text in `texts`."""
        return [message.role for message in all_messages(self.example) for _ in _parts(message)]

    @property
    def calls(self) -> list[str]:
        """The arguments of all calls of tools."""
        calls = [call for message in all_messages(self.example) for call in message.tool_calls]
        return [c.arguments if isinstance(c.arguments, str) else json.dumps(c.arguments) for c in calls]

    def rewritten(self, texts: Sequence[str]) -> "Row":
        """The row with other texts. Raises `BadRow` if it cannot be trained on any more."""
        remaining = iter(texts)

        def with_texts(messages: Sequence[Message]) -> tuple[Message, ...]:
            return tuple(
                replace(message, content=next(remaining), reasoning=next(remaining))
                if message.reasoning
                else replace(message, content=next(remaining))
                for message in messages
            )

        example = self.example
        if isinstance(example, Dialog):
            return replace(self, example=replace(example, messages=with_texts(example.messages)))
        prompt = with_texts(example.prompt)
        responses = tuple(with_texts(response) for response in example.responses)
        return replace(self, example=replace(example, prompt=prompt, responses=responses))

    def as_json(self, annotations: Mapping[str, Any]) -> dict[str, Any]:
        """The row in the form that `data pack` reads without `columns`, with its annotations."""
        example = self.example
        values: dict[str, Any]
        if isinstance(example, Dialog):
            values = {"messages": _marked(example.messages)}
        else:
            values = {"prompt": messages_as_json(example.prompt)}
            names = _RESPONSES[len(example.responses)]
            values |= {n: _marked(r) for n, r in zip(names, example.responses, strict=True)}
            values |= {"rating": example.rating} if example.rating else {}
        values |= {"tools": list(example.tools)} if example.tools else {}
        return {**values, **self.extra, ANNOTATIONS: dict(annotations)}


def _parts(message: Message) -> tuple[str, ...]:
    return (message.content, message.reasoning) if message.reasoning else (message.content,)


def all_messages(example: Dialog | Preference) -> Sequence[Message]:
    """The messages of a dialog, or those of a preference's prompt and of all its responses."""
    if isinstance(example, Dialog):
        return example.messages
    return [*example.prompt, *chain.from_iterable(example.responses)]


def _marked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in JSON. Only those that are not trained have a mark, so that `data.train_on` still counts."""
    found = messages_as_json(messages)
    for message, values in zip(messages, found, strict=True):
        if message.role == "assistant" and not message.trained:
            values["train"] = False
    return found
