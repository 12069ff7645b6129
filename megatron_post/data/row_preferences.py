"""Rows of ranked responses to `Preference`."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from megatron_post.data.dialog import BadRow, Message, Preference
from megatron_post.data.row_columns import Columns
from megatron_post.data.row_keys import Keys, as_list, from_json, messages_in, text_of
from megatron_post.data.row_messages import Said
from megatron_post.data.row_tools import tools_of

_TURN = re.compile(r"\n\n(Human|Assistant):")
_PROMPTS = ("prompt", "conversations", "messages")
# The messages of a value, and the key that it has.
Read = Callable[[Any, str], Said]


def is_transcript(text: Any) -> bool:
    """Whether a value is a text of turns as HH-RLHF writes them."""
    return isinstance(text, str) and _TURN.match(text) is not None


def transcript_turns(text: str) -> list[dict[str, str]]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages. Raises `BadRow`."""
    start, *turns = _TURN.split(text)
    if start.strip() or not turns:
        raise BadRow("a transcript starts with a blank line and 'Human:'")
    said = list(zip(turns[::2], turns[1::2], strict=True))
    for number, ((before, _), (name, _)) in enumerate(pairwise(said), start=2):
        if before == name == "Assistant":
            raise BadRow(
                f"message {number} is from assistant, whose turn had ended with message {number - 1}"
            )
    return [{"role": "user" if name == "Human" else "assistant", "content": text} for name, text in said]


def turns_of(value: Any, role: str) -> list[Any]:
    """A text of one role, a transcript that is a prompt, messages or their JSON text, as a list.

    Raises `BadRow` for anything else.
    """
    if role == "user" and is_transcript(value):
        turns = transcript_turns(value)
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
    """Earlier turns: messages, or pairs of a question and its answer. Raises `BadRow`."""
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
    """TRL's prompt, chosen and rejected; `edited`, `rating` and `tools` if any. Raises `BadRow`."""
    responses = [read(turns_of(row.require(name), "assistant"), name) for name in _responses_in(row)]
    is_whole = all(response.messages[0].role != "assistant" for response in responses)
    # beside whole conversations, `messages` are mostly the chosen one again
    named = next((name for name in (_PROMPTS[:1] if is_whole else _PROMPTS) if name in row), None)
    prompt = None
    if named is not None:
        prompt = read([*history_of(row.get("history")), *turns_of(row.get(named), "user")], named)
    rating, tools = rating_of(row.get("rating")), tools_of(row)
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
    """HH-RLHF's chosen and rejected. Raises `BadRow`."""
    names = _responses_in(row)
    dialogs = [read(transcript_turns(text_of(row.require(name), name)), name) for name in names]
    return _split(dialogs, None, rating_of(row.get("rating")), ())


def from_ranked_columns(row: Keys, columns: Columns, prompt: tuple[Message, ...]) -> Preference:
    """Responses in columns of their own. Raises `BadRow`."""
    names = ["edited"] if columns.text("edited", row) else []
    responses = tuple(columns.response(name, row) for name in (*names, "chosen", "rejected"))
    return Preference(prompt, responses, rating_of(columns.text("rating", row)))


def rating_of(value: Any) -> str | None:
    return text_of(value, "rating").strip().lower().replace(" ", "_") if value else None


def _responses_in(row: Keys) -> list[str]:
    """Names of the ranked responses, best first; not every row has been edited."""
    return ["edited", "chosen", "rejected"] if row.get("edited") else ["chosen", "rejected"]


def _split(
    dialogs: Sequence[Said], prompt: Said | None, rating: str | None, tools: tuple[dict[str, Any], ...]
) -> Preference:
    """Conversations to their common beginning, which ends before an assistant's message, and the rests."""
    said = [dialog.messages for dialog in dialogs]
    shortest = min(map(len, said))
    common = next((k for k in range(shortest) if len({repr(messages[k]) for messages in said}) > 1), shortest)
    while common and said[0][common - 1].role not in ("user", "ipython"):
        common -= 1
    for dialog in dialogs:
        _check_marks(dialog, common)
    beginning = said[0][:common] if prompt is None else _merged(prompt.messages, said[0][:common])
    return Preference(beginning, tuple(messages[common:] for messages in said), rating, tools)


def _merged(prompt: tuple[Message, ...], common: tuple[Message, ...]) -> tuple[Message, ...]:
    """The longer of a prompt and of the beginning of the responses, one of which ends with the other or
    begins with the prompt."""
    if prompt[-len(common) :] == common:
        return prompt
    if prompt in (common[-len(prompt) :], common[: len(prompt)]):
        return common
    raise BadRow("`prompt` and the beginning of `chosen` and `rejected` contradict each other")


def _check_marks(said: Said, first_compared: int) -> None:
    """Raise `BadRow` for marks that comparing cannot obey: responses are compared whole, and alone."""
    answers = [i for i, message in enumerate(said.messages) if message.role == "assistant"]
    for i in answers:
        mark = said.marks[i]
        if mark is not None and mark != (i >= first_compared):
            raise BadRow(
                f"message {i + 1} is marked as {'' if mark else 'not '}trained; of a preference the "
                "responses are compared, whole, and nothing before them"
            )
