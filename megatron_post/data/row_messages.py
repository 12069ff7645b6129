"""Turns OpenAI's and ShareGPT's messages into `Message`. Texts are stripped, as in Llama 3.0's reference."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_post.config.data import Reasoning
from megatron_post.data.dialog import BadRow, Message
from megatron_post.data.row_keys import Keys, as_list, from_json, is_blank, text_of
from megatron_post.data.row_labels import refuse_label
from megatron_post.data.row_marks import message_mark, words_of
from megatron_post.data.row_tools import calls_in, calls_of

_ROLES = {
    **{name: "system" for name in ("system", "developer")},
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "chatgpt", "bot", "model")},
    **{name: "ipython" for name in ("ipython", "tool", "function", "observation", "tool_response")},
}
_CALL_ROLES = ("function_call", "tool_call")  # messages of the assistant whose content is a tool call
REASONING = ("reasoning_content", "reasoning", "thinking")
_UNUSABLE = {
    **dict.fromkeys(
        ("images", "image", "videos", "video", "audios", "audio"),
        "only text can be trained on. If the text does not depend on it,",
    ),
    **dict.fromkeys(
        ("train_detail", "training_detail"), "a message is trained whole or not at all. Mark it so, or"
    ),
    "refusal": "no template renders it. Write it as the content if it should be trained, or",
}
_THOUGHT = {"reasoning", "think", "thinking", "thought", "thoughts", "cot", "rationale", "scratchpad", "plan"}


@dataclass(frozen=True)
class MarkedMessages:
    """Messages, and for each of them whether its marks say that it is trained (None without a mark)."""

    messages: tuple[Message, ...]
    marks: tuple[bool | None, ...]


def read_messages(raw: Any, row: Keys, *, name: str, reasoning: Reasoning) -> MarkedMessages:
    """The messages of a row. An assistant's turn continues after a tool call and until the next user message.

    raw: a list of messages, or its JSON text. name: its key. Raises `BadRow`.
    """
    raw = as_list(from_json(raw, name) if isinstance(raw, str) else raw)
    if not isinstance(raw, list) or not raw:
        raise BadRow(f"{name} must be a list that is not empty, not {raw!r:.80}")
    found = [_keys_of(message, number, row) for number, message in enumerate(raw, start=1)]
    names = [_role_name(keys, number) for number, keys in enumerate(found, start=1)]
    roles = ["assistant" if name in _CALL_ROLES else _ROLES.get(name, name) for name in names]
    followed = [role in ("assistant", "ipython") for role in roles[1:]] + [False]
    messages, marks = [], []
    for number, (keys, role, more) in enumerate(zip(found, roles, followed, strict=True), start=1):
        refuse_unusable(keys, f"message {number}")
        if role == "assistant":
            refuse_label(keys, f" of message {number}")
        if reasoning != "drop":
            _refuse_unknown_thoughts(keys, number)
        thought = _reasoning(keys, number, reasoning)
        calls = calls_of(keys)
        text, part_thought = _content(keys, number, role, reasoning)
        if names[number - 1] in _CALL_ROLES:
            text, calls = "", calls_in(text, keys)
        turn_ends = role != "assistant" or not (calls or more)
        messages.append(
            Message(role, text, calls, turn_ends, reasoning=thought or part_thought)  # type: ignore[arg-type]
        )
        marks.append(message_mark(keys, number))
        if marks[-1] and role != "assistant":
            raise BadRow(f"message {number} from {role} is marked as trained; only the assistant's can be")
    return MarkedMessages(tuple(messages), tuple(marks))


def refuse_unusable(keys: Keys, place: str, *, skip: Container[str] = ()) -> None:
    """Raise `BadRow` for keys of a message or a row that cannot be rendered, such as images."""
    for key in keys.among(_UNUSABLE):
        if key not in skip and keys.has_value(key):
            raise BadRow(f"{place} has `{key}`; {_UNUSABLE[key]} list {key} under the source's `ignore`")


def _refuse_unknown_thoughts(keys: Keys, number: int) -> None:
    """Raise `BadRow` for a text or a list under an unknown name that seems to hold reasoning."""
    for key in keys:
        if key in REASONING or _THOUGHT.isdisjoint(words_of(key)):
            continue
        if isinstance(keys.peek(key), str | list | Mapping) and not is_blank(keys.peek(key)):
            raise BadRow(
                f"message {number} has `{key}`, which seems to hold reasoning: rename it to {REASONING[0]}, "
                f"which data.reasoning controls, or list {key} under the source's `ignore`"
            )


def _keys_of(message: Any, number: int, row: Keys) -> Keys:
    keys = row.nested(message, "messages.") if isinstance(message, Mapping) else None
    if keys is None or not isinstance(keys.peek("role") or keys.peek("from"), str):
        raise BadRow(f"message {number} must be a mapping with role and content, not {message!r:.80}")
    return keys


def _role_name(keys: Keys, number: int) -> str:
    names = [keys.get(key) for key in ("role", "from") if key in keys]
    if len({_ROLES.get(name, name) for name in map(str, names)}) > 1:
        raise BadRow(f"`role` and `from` of message {number} contradict each other: {names}")
    return str(names[0])


def _reasoning(keys: Keys, number: int, rule: Reasoning) -> str:
    """The reasoning of a message, or "" if it is dropped. Raises `BadRow` if `rule` is "refuse"."""
    names = [key for key in keys.among(REASONING) if keys.has_value(key)]
    if names and rule == "refuse":
        raise BadRow(
            f"message {number} has `{names[0]}`; data.reasoning says whether it is left out or rendered"
        )
    if not names or rule == "drop":
        return ""
    return text_of(keys.one_of(*names), names[0]).strip()


def _content(keys: Keys, number: int, role: str, reasoning: Reasoning) -> tuple[str, str]:
    """The text and the reasoning in a message's content, which is a text or OpenAI's list of parts."""
    content = as_list(keys.one_of("content", "value"))
    if content is None and role != "assistant":
        raise BadRow(f"message {number} from {role} has no content")
    if isinstance(content, str):
        return content.strip(), ""
    texts, thoughts = [], []
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind in ("thinking", "reasoning"):
            thought = keys.nested({"thinking": part.get(kind) or part.get("text")}, "content.")
            thoughts.append(_reasoning(thought, number, reasoning))
        elif kind == "text":
            inner = keys.nested(part, "content.")
            inner.get("type")
            texts.append(text_of(inner.get("text"), "text"))
        else:
            raise BadRow(f"content has parts of type {[str(kind)]}; only text can be trained on")
    whole = "".join(texts) if isinstance(content, list) else "" if content is None else content
    return text_of(whole, "content").strip(), "\n".join(filter(None, thoughts))
