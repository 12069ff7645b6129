"""Turns rows of ranked responses into `Preference`."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from megatron_post.data.dialog import BadRow, Message, Preference
from megatron_post.data.row_columns import Columns
from megatron_post.data.row_keys import Keys, as_list, from_json, messages_in, text_of
from megatron_post.data.row_messages import MarkedMessages
from megatron_post.data.row_tools import tools_of

_TURN = re.compile(r"\n\n(Human|Assistant):")
_PROMPTS = ("prompt", "conversations", "messages")
# A function that reads the messages of a value. Its second argument is the key of the value, for errors.
Read = Callable[[Any, str], MarkedMessages]


def is_transcript(text: Any) -> bool:
    """Whether a value is a text with turns in HH-RLHF's form."""
    return isinstance(text, str) and _TURN.match(text) is not None


def _transcript_turns(text: str) -> list[dict[str, str]]:
    """The messages of a text "\\n\\nHuman: ...\\n\\nAssistant: ...". Raises `BadRow`."""
    start, *turns = _TURN.split(text)
    if start.strip() or not turns:
        raise BadRow("a transcript starts with a blank line and 'Human:'")
    named = list(zip(turns[::2], turns[1::2], strict=True))
    for number, ((before, _), (name, _)) in enumerate(pairwise(named), start=2):
        if before == name == "Assistant":
            raise BadRow(
                f"message {number} is from assistant, whose turn had ended with message {number - 1}"
            )
    return [{"role": "user" if name == "Human" else "assistant", "content": text} for name, text in named]


def turns_of(value: Any, role: str) -> list[Any]:
    """A list of messages from a text of one role, a prompt as a transcript, messages, or their JSON text.

    Raises `BadRow` for other values.
    """
    if role == "user" and is_transcript(value):
        turns = _transcript_turns(value)
        opens_response = turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip()
        return turns[:-1] if opens_response else turns
    if isinstance(value, str):
        return messages_in(value) or [{"role": role, "content": value}]
    value = as_list(value)
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return [value]
    if not isinstance(value, list):
        raise BadRow(f"a text or a list of messages is wanted, not {value!r:.80}")
    return value


def history_of(value: Any) -> list[Any]:
    """The messages of earlier turns, from messages or pairs of question and answer. Raises `BadRow`."""
    turns = as_list(from_json(value, "history")) or []
    if not isinstance(turns, list):
        raise BadRow(f"history must be a list, not {turns!r:.80}")
    messages: list[Any] = []
    for turn in turns:
        if isinstance(turn, Mapping):
            messages.append(turn)
        elif isinstance(turn, list) and len(turn) == 2:
            messages += [{"role": r, "content": c} for r, c in zip(("user", "assistant"), turn, strict=True)]
        else:
            raise BadRow(f"history holds messages or pairs of question and answer, not {turn!r:.80}")
    return messages


def from_preference(row: Keys, read: Read) -> Preference:
    """A preference in TRL's form, with optional `edited`, `rating` and `tools`. Raises `BadRow`."""
    responses = [read(turns_of(row.require(name), "assistant"), name) for name in _responses_in(row)]
    is_whole = all(response.messages[0].role != "assistant" for response in responses)
    # In datasets with whole conversations, `messages` usually repeats the chosen one. It is not the prompt.
    named = next((name for name in (_PROMPTS[:1] if is_whole else _PROMPTS) if name in row), None)
    prompt = None
    if named is not None:
        prompt = read([*history_of(row.get("history")), *turns_of(row.get(named), "user")], named)
    rating, tools = _rating_of(row.get("rating")), tools_of(row)
    if is_whole:
        return _split(responses, prompt, rating, tools)
    if prompt is None:
        raise BadRow(
            "chosen and rejected are not whole conversations, and there is no `prompt` column; name it in "
            "the source's `columns`, as {user: instruction+input, chosen: chosen, rejected: rejected}"
        )
    _check_marks(prompt, len(prompt.messages))
    for response in responses:
        _check_marks(response, 0)
    return Preference(prompt.messages, tuple(response.messages for response in responses), rating, tools)


def from_transcripts(row: Keys, read: Read) -> Preference:
    """A preference in HH-RLHF's form. Raises `BadRow`."""
    names = _responses_in(row)
    dialogs = [read(_transcript_turns(text_of(row.require(name), name)), name) for name in names]
    return _split(dialogs, None, _rating_of(row.get("rating")), ())


def from_ranked_columns(row: Keys, columns: Columns, prompt: tuple[Message, ...]) -> Preference:
    """A preference whose responses are in the columns that the source names. Raises `BadRow`."""
    names = ["edited"] if columns.text("edited", row) else []
    responses = tuple(columns.response(name, row) for name in (*names, "chosen", "rejected"))
    return Preference(prompt, responses, _rating_of(columns.text("rating", row)))


def _rating_of(value: Any) -> str | None:
    return text_of(value, "rating").strip().lower().replace(" ", "_") if value else None


def _responses_in(row: Keys) -> list[str]:
    """The names of the ranked responses, the best first. Only some rows have an edited response."""
    return ["edited", "chosen", "rejected"] if row.get("edited") else ["chosen", "rejected"]


def _split(
    dialogs: Sequence[MarkedMessages],
    prompt: MarkedMessages | None,
    rating: str | None,
    tools: tuple[dict[str, Any], ...],
) -> Preference:
    """A preference whose prompt is the common beginning of whole conversations.

    The prompt ends before an assistant message, and the responses are the rests.
    """
    whole = [dialog.messages for dialog in dialogs]
    shortest = min(map(len, whole))
    common = next(
        (k for k in range(shortest) if len({repr(messages[k]) for messages in whole}) > 1), shortest
    )
    while common and whole[0][common - 1].role not in ("user", "ipython"):
        common -= 1
    for dialog in dialogs:
        _check_marks(dialog, common)
    beginning = whole[0][:common] if prompt is None else _merged(prompt.messages, whole[0][:common])
    return Preference(beginning, tuple(messages[common:] for messages in whole), rating, tools)


def _merged(prompt: tuple[Message, ...], common: tuple[Message, ...]) -> tuple[Message, ...]:
    """The longer one of the prompt and the common beginning of the responses.

    One must end with the other, or the beginning must start with the prompt. Raises `BadRow` otherwise.
    """
    if prompt[-len(common) :] == common:
        return prompt
    if prompt in (common[-len(prompt) :], common[: len(prompt)]):
        return common
    raise BadRow("`prompt` and the beginning of `chosen` and `rejected` contradict each other")


def _check_marks(read: MarkedMessages, first_compared: int) -> None:
    """Raise `BadRow` for marks that a comparison cannot follow.

    A preference compares whole responses, and nothing before them.
    """
    answers = [i for i, message in enumerate(read.messages) if message.role == "assistant"]
    for i in answers:
        mark = read.marks[i]
        if mark is not None and mark != (i >= first_compared):
            raise BadRow(
                f"message {i + 1} is marked as {'' if mark else 'not '}trained; a preference "
                "compares whole responses and nothing before them"
            )
