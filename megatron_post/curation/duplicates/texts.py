"""The texts of a row that are compared with those of other rows."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_post.curation.duplicates.words import Dialog
from megatron_post.curation.row import Row
from megatron_post.data.dialog import Dialog as DialogRow
from megatron_post.data.dialog import Message


@dataclass(frozen=True)
class RowTexts:
    """The messages of a row.

    answer: the last message of the assistant, or all responses of a preference. prompt: the messages before
    it. tools: one pseudo-message with the definitions of tools, if there are any.
    """

    tools: Dialog
    prompt: Dialog
    answer: Dialog

    @property
    def dialog(self) -> Dialog:
        """All messages, without the definitions of tools, which many rows have in common."""
        return [*self.prompt, *self.answer]

    @property
    def everything(self) -> Dialog:
        return [*self.tools, *self.dialog]


def texts_of(row: Row) -> RowTexts:
    example = row.example
    tools = [("tools", json.dumps(example.tools, sort_keys=True))] if example.tools else []
    if isinstance(example, DialogRow):
        messages = _texts(example.messages)
        return RowTexts(tools, messages[:-1], messages[-1:])
    answer = [text for response in example.responses for text in _texts(response)]
    return RowTexts(tools, _texts(example.prompt), answer)


def _texts(messages: Iterable[Message]) -> list[tuple[str, str]]:
    """The role and the text of each message. A call of a tool belongs to the text."""
    return [
        (
            message.role,
            "\n".join(
                [message.text, *(f"{call.name} {json.dumps(call.arguments)}" for call in message.tool_calls)]
            ),
        )
        for message in messages
    ]
