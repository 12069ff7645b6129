"""Turns rows of the common formats into `Dialog` and `Preference`. docs/rows.md has an example of each.

messages    Messages of OpenAI's or ShareGPT's form, in `messages`, `conversations` or the only other column
            that holds messages. Or {"prompt", "completion"}, {"query", "response"}, or {"instruction",
            "input", "output"}.
preference  TRL's {"prompt", "chosen", "rejected"}, plain or conversational. chosen and rejected may also hold
            the whole conversation. "edited" (better than chosen), "rating" and "tools" are optional.
steps       TRL's {"prompt", "completions", "labels"}, and PRM800K's {"question", "label"}.
transcript  HH-RLHF's {"chosen", "rejected"} as "\\n\\nHuman: ...\\n\\nAssistant: ..." texts.
columns     One column per role, which `source.columns` names, as in {user: question, assistant: answer}. A
            value may join columns ("instruction+input" joins those that are not blank with a blank line) and
            name nested ones ("instances.0.output"). With `chosen` and `rejected` instead of `assistant` the
            row is a preference, and with `steps` and `labels` it has labelled steps. {messages: dialog} names
            the column of messages, and {text: content} that of documents, which stage=pretrain trains.
            `end_marker` is not a column. It is a text that is removed from the end of responses
            ("<|endoftext|>" in T0's data).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from megatron_post.config.data import Neutral, Reasoning, Source, TrainOn
from megatron_post.data.dialog import BadRow, Dialog, Message
from megatron_post.data.document import read_document
from megatron_post.data.row_columns import Columns, check_columns
from megatron_post.data.row_keys import KeyCounts, Keys, as_list, text_of
from megatron_post.data.row_messages import MarkedMessages, read_messages
from megatron_post.data.row_preferences import (
    from_preference,
    from_ranked_columns,
    from_transcripts,
    history_of,
    is_transcript,
    turns_of,
)
from megatron_post.data.row_refusals import SYSTEM, refuse_harmful, refuse_templated, refuse_unused_context
from megatron_post.data.row_steps import from_step_columns, from_steps, is_prm800k
from megatron_post.data.row_tools import tools_of
from megatron_post.data.step_example import Conversation, Example

_MESSAGES = ("messages", "conversations")
_NO_MESSAGES = ("prompt", "completion", "chosen", "rejected", "edited", "history", "query", "response")
# the columns of the prompt, of an optional part that is appended to the prompt, and of the response
_PAIRS = (("prompt", None, "completion"), ("query", None, "response"), ("instruction", "input", "output"))


def example_of_row(
    row: Any,
    source: Source,
    *,
    train_on: TrainOn = "all_turns",
    reasoning: Reasoning = "refuse",
    neutral: Neutral = "right",
    counts: KeyCounts | None = None,
) -> Example:
    """The example of a single row. See `RowReader`."""
    return RowReader(source, train_on=train_on, reasoning=reasoning, neutral=neutral, counts=counts)(row)


class RowReader:
    """Makes examples of one source's rows. `counts` collects the keys that nothing has read."""

    def __init__(
        self,
        source: Source,
        *,
        train_on: TrainOn,
        reasoning: Reasoning,
        neutral: Neutral = "right",
        counts: KeyCounts | None = None,
    ) -> None:
        """train_on: as `data.train_on`, which the source may override. neutral: as `data.steps.neutral`.

        Raises `ValueError` if `source.columns` cannot make an example.
        """
        check_columns(source)
        self._source, self._reasoning, self._neutral = source, reasoning, neutral
        self._train_on = source.train_on or train_on
        self._counts = KeyCounts() if counts is None else counts
        self._columns = Columns(source, self._counts)

    def __call__(self, raw: Any) -> Example:
        """The example in a row, by the source's format. Raises `BadRow` with the reason."""
        if not isinstance(raw, Mapping):
            raise BadRow(f"a row must be a mapping, not {type(raw).__name__}")
        row = Keys(raw, ignore=self._source.ignore)
        if "text" in self._source.columns:
            document = read_document(row, self._columns, self._source.columns["text"])
            self._counts.unused.update(row.unused())
            return document
        refuse_harmful(row, self._columns, reasoning=self._reasoning)
        system = self._columns.text("system", row)
        if not self._columns.by_role:
            system = system or _system_of(row)
        example = _with_system(self._example(row), system)
        opening = example.messages if isinstance(example, Dialog) else example.prompt
        responses = () if isinstance(example, Dialog) else example.responses
        messages = list(chain(opening, *responses))
        texts = "\n".join(message.text for message in messages)
        refuse_unused_context(row, texts, by_role=self._columns.by_role)
        for message in messages if self._source.templated == "refuse" else ():
            refuse_templated(message)
        self._counts.unused.update(row.unused())
        return example

    def _example(self, row: Keys) -> Conversation:
        columns = self._source.columns
        if "steps" in columns:
            return from_step_columns(row, self._columns, columns)
        if "user" in columns:
            return self._from_columns(row)
        if "messages" in columns:
            read = self._read(self._columns.value("messages", row), row, columns["messages"])
            return Dialog(self._trained(read), tools_of(row, self._columns.value("tools", row)))
        chosen = self._source.format if self._source.format != "auto" else _detect(row)
        if chosen == "messages":
            return self._from_messages(row)
        if chosen == "steps":
            return from_steps(row, lambda value, name: self._read(value, row, name), neutral=self._neutral)
        make = from_preference if chosen == "preference" else from_transcripts
        return make(row, lambda value, name: self._read(value, row, name))

    def _from_messages(self, row: Keys) -> Dialog:
        """The dialog of a row, which may hold the same conversation in several forms.

        The texts must then be equal, and a message is trained if every form trains it.
        """
        found = {
            f"{prompt} and {response}": self._pair(row, prompt, joined, response)
            for prompt, joined, response in _pairs_in(row)
        }
        if not found and "completion" in row:
            row.require("prompt")
        columns = _message_columns(row) if not found else [name for name in _MESSAGES if name in row]
        found |= {name: self._trained(self._read(row.get(name), row, name)) for name in columns}
        if not found:
            raise BadRow(f"no messages in the columns {list(row)}")
        messages, *others = found.values()
        for other in others:
            if _all_trained(other) != _all_trained(messages):
                raise BadRow(f"{', '.join(found)} hold different conversations")
            messages = tuple(a if b.trained else b for a, b in zip(messages, other, strict=True))
        return Dialog(messages, tools_of(row))

    def _pair(self, row: Keys, prompt: str, joined: str | None, response: str) -> tuple[Message, ...]:
        """The messages of a prompt and its response. Only the response is trained."""
        asked = row.require(prompt)
        if joined is not None and row.has_value(joined):
            asked = f"{text_of(asked, prompt).strip()}\n\n{text_of(row.get(joined), joined).strip()}"
        context = [*history_of(row.get("history")), *turns_of(asked, "user")]
        return self._completion(context, turns_of(row.require(response), "assistant"), row)

    def _from_columns(self, row: Keys) -> Conversation:
        asked = Message("user", self._columns.text("user", row))
        if "assistant" not in self._source.columns:
            return from_ranked_columns(row, self._columns, (asked,))
        context = history_of(self._columns.value("history", row))
        (answer,) = self._columns.response("assistant", row)
        turns = [{"role": message.role, "content": message.content} for message in (asked, answer)]
        return Dialog(self._completion([*context, turns[0]], turns[1:], row))

    def _completion(self, context: list[Any], completion: list[Any], row: Keys) -> tuple[Message, ...]:
        read = self._read([*context, *completion], row, "prompt")
        first = len(context)
        if read.messages[first - 1].role == "assistant" == read.messages[first].role:
            raise BadRow("the prompt ends with the assistant: a completion cannot continue its message")
        if any(read.marks[:first]):
            raise BadRow("a message of the prompt is marked as trained; only the completion is trained")
        return _masked(read, first)

    def _trained(self, read: MarkedMessages) -> tuple[Message, ...]:
        """The messages with the last turn or all turns trained.

        A turn is everything after a user message, that is, tool calls, their results and the answer.
        """
        asked = [i for i, message in enumerate(read.messages) if message.role == "user"]
        return _masked(read, asked[-1] + 1 if asked and self._train_on == "last_turn" else 0)

    def _read(self, raw: Any, row: Keys, name: str) -> MarkedMessages:
        return read_messages(raw, row, name=name, reasoning=self._reasoning)


def _detect(row: Keys) -> str:
    if "chosen" in row and "rejected" in row:
        return "transcript" if "prompt" not in row and is_transcript(row.peek("chosen")) else "preference"
    if is_prm800k(row) or ("completions" in row and "labels" in row):
        return "steps"
    if "completion" in row or _pairs_in(row) or _message_columns(row):
        return "messages"
    raise BadRow(
        f"cannot tell the format from the columns {list(row)}: neither `messages`, `prompt` and "
        "`completion`, `chosen` and `rejected`, nor `completions` and `labels`; name the columns in the "
        "source's `columns`, for example {user: question, assistant: answer}, {user: instruction+input, "
        "assistant: output} or {messages: dialog}. A single text with all turns must be split into messages "
        "first"
    )


def _pairs_in(row: Keys) -> list[tuple[str, str | None, str]]:
    return [pair for pair in _PAIRS if pair[0] in row and pair[2] in row]


def _message_columns(row: Keys) -> list[str]:
    """The columns of messages by their usual names, or the only other column that holds messages."""
    if known := [name for name in _MESSAGES if name in row]:
        return known
    found = [name for name in row if name not in _NO_MESSAGES and _holds_messages(row.peek(name))]
    if len(found) > 1:
        raise BadRow(f"{found} all hold messages; choose with columns={{messages: {found[0]}}}")
    return found


def _holds_messages(value: Any) -> bool:
    value = as_list(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in value)
    )


def _masked(read: MarkedMessages, first_trained: int) -> tuple[Message, ...]:
    """The messages with `trained` set by the message's own mark, or else by its position.

    Without a mark, assistant messages from `first_trained` on are trained.
    """
    return tuple(
        replace(message, trained=False)
        if message.role == "assistant" and not (number >= first_trained if mark is None else mark)
        else message
        for number, (message, mark) in enumerate(zip(read.messages, read.marks, strict=True))
    )


def _all_trained(messages: Sequence[Message]) -> list[Message]:
    """The messages without the difference between trained and masked ones, for comparisons."""
    return [replace(message, trained=True) for message in messages]


def _system_of(row: Keys) -> str:
    """The system prompt beside the messages, "" if there is none. Raises `BadRow`."""
    names = [name for name in SYSTEM if row.has_value(name)]
    return text_of(row.one_of(*names), names[0]).strip() if names else ""


def _with_system(example: Conversation, text: str) -> Conversation:
    """The example with a system prompt before its messages. Raises `BadRow` if it has another."""
    messages = example.messages if isinstance(example, Dialog) else example.prompt
    if not text:
        return example
    if messages[0].role == "system":
        if messages[0].content != text:
            raise BadRow(f"the row's system prompt {text!r:.40} differs from the one in its messages")
        return example
    messages = (Message("system", text), *messages)
    return (
        replace(example, messages=messages)
        if isinstance(example, Dialog)
        else replace(example, prompt=messages)
    )
