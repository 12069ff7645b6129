"""Rows of the formats in use to `Dialog` and `Preference`. Texts are stripped, as Llama 3.0's reference does.

messages    {"messages"} of OpenAI and TRL, or {"prompt", "completion"}, plain or conversational; "tools"
preference  TRL's {"prompt", "chosen", "rejected"}, plain or conversational; chosen and rejected may also hold
            the whole conversation; "edited" (better than chosen), "rating" and "tools" if any
transcript  HH-RLHF's {"chosen", "rejected"} as "\\n\\nHuman: ...\\n\\nAssistant: ..." texts
columns     a column a role, named by `source.columns`: {user: question, assistant: answer}. A value may join
            columns ("instruction+input": those not blank, with a blank line between) and reach into nested
            ones ("instances.0.output"). `chosen` and `rejected` instead of `assistant` make a preference.
            `end_marker` is no column but a text cut off the end of responses ("<|endoftext|>" in T0's), which
            otherwise stays.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_post.config.schema import Source, TrainOn
from megatron_post.data.dialog import CODE_INTERPRETER, BadRow, Dialog, Message, Preference, ToolCall

_ROLE_NAMES = {"developer": "system", "tool": "ipython", "function": "ipython"}
# Keys that say whether a message is trained; those of masks say the contrary.
_MARKS = (
    *("weight", "train", "training", "trainable", "trained", "loss", "loss_mask", "step_loss_mask"),
    *("mask", "masked"),
)
_TURN = re.compile(r"\n\n(Human|Assistant):")
_DIALOG_KEYS = {"system", "user", "assistant", "end_marker"}
_PREFERENCE_KEYS = {"system", "user", "chosen", "rejected", "edited", "rating", "end_marker"}


def check_columns(source: Source) -> None:
    """Raise `ValueError` if `source.columns` cannot make a dialog or a preference."""
    keys = set(source.columns)
    if source.format not in ("auto", "columns"):
        if keys:
            raise ValueError(f"source {source.name!r}: columns go with format=columns, not {source.format}")
    elif keys or source.format == "columns":
        fits_dialog = {"user", "assistant"} <= keys <= _DIALOG_KEYS
        if not fits_dialog and not {"user", "chosen", "rejected"} <= keys <= _PREFERENCE_KEYS:
            raise ValueError(
                f"source {source.name!r}: columns {sorted(keys)} make neither a dialog (user, assistant; if "
                "wanted system, end_marker) nor a preference (user, chosen, rejected; if wanted system, "
                "edited, rating, end_marker)"
            )


def example_of_row(row: Any, source: Source, *, train_on: TrainOn = "all_turns") -> Dialog | Preference:
    """The dialog or preference that a row holds, by the source's format. Raises `BadRow` with the reason."""
    if not isinstance(row, Mapping):
        raise BadRow(f"a row must be a mapping, not {type(row).__name__}")
    chosen_format = (
        "columns" if source.columns else source.format if source.format != "auto" else _detect(row)
    )
    match chosen_format:
        case "messages":
            return _from_messages(row, train_on)
        case "preference":
            return _from_preference(row)
        case "transcript":
            return _from_transcripts(row)
        case _:
            return _from_columns(row, source.columns)


def _detect(row: Mapping[str, Any]) -> str:
    if "chosen" in row and "rejected" in row:
        is_transcript = "prompt" not in row and isinstance(row["chosen"], str) and _TURN.match(row["chosen"])
        return "transcript" if is_transcript else "preference"
    if "messages" in row or {"prompt", "completion"} <= row.keys():
        return "messages"
    raise BadRow(
        f"cannot tell the format from the columns {list(row)}: neither `messages`, `prompt` and "
        "`completion`, nor `chosen` and `rejected`; name the columns in the source's `columns`, for example "
        "{user: question, assistant: answer} or {user: instruction+input, assistant: output}"
    )


def _from_messages(row: Mapping[str, Any], train_on: TrainOn) -> Dialog:
    if row.get("messages") is not None:
        raw = row["messages"]
        messages = _messages(raw)
        first = _start_of_last_turn(messages) if train_on == "last_turn" else 0
    else:
        prompt = _list_of(_column(row, "prompt"), "user")
        raw = prompt + _list_of(_column(row, "completion"), "assistant")
        messages, first = _messages(raw), len(prompt)
        if any(mark for mark in map(trained_mark, prompt)):
            raise BadRow("a message of the prompt is marked as trained; a completion is trained alone")
    return Dialog(_masked(messages, [trained_mark(message) for message in raw], first), _tools(row))


def _start_of_last_turn(messages: Sequence[Message]) -> int:
    """Where the assistant's last turn begins, tool calls and their results included."""
    return max((i for i, message in enumerate(messages) if message.role == "user"), default=-1) + 1


def _masked(
    messages: Sequence[Message], marks: Sequence[bool | None], first_trained: int
) -> tuple[Message, ...]:
    """What a message says about itself comes first, then whether it stands before `first_trained`."""
    masked = []
    for number, (message, mark) in enumerate(zip(messages, marks, strict=True)):
        if message.role != "assistant" and mark:
            raise BadRow(
                f"message {number + 1} from {message.role} is marked as trained; only the assistant's can be"
            )
        trained = number >= first_trained if mark is None else mark
        masked.append(message if trained or message.role != "assistant" else replace(message, trained=False))
    return tuple(masked)


def _from_preference(row: Mapping[str, Any]) -> Preference:
    names = _responses_in(row)
    responses = [_messages(_list_of(_column(row, name), "assistant")) for name in names]
    rating, tools = _rating(row.get("rating")), _tools(row)
    if all(response[0].role != "assistant" for response in responses):
        return _split_prompt(responses, rating, tools)
    if row.get("prompt") is None:
        raise BadRow("chosen and rejected are not whole conversations, and there is no `prompt` column")
    return Preference(_messages(_list_of(row["prompt"], "user")), tuple(responses), rating, tools)


def _from_transcripts(row: Mapping[str, Any]) -> Preference:
    names = _responses_in(row)
    dialogs = [_transcript(_text(_column(row, name), name)) for name in names]
    return _split_prompt(dialogs, _rating(row.get("rating")), ())


def _transcript(text: str) -> tuple[Message, ...]:
    start, *turns = _TURN.split(text)
    if start.strip() or not turns:
        raise BadRow("a transcript starts with a blank line and 'Human:'")
    said = zip(turns[::2], turns[1::2], strict=True)
    return tuple(Message("user" if name == "Human" else "assistant", text.strip()) for name, text in said)


def _split_prompt(
    dialogs: list[tuple[Message, ...]], rating: str | None, tools: tuple[dict[str, Any], ...]
) -> Preference:
    """Conversations to their common beginning, which ends before an assistant's message, and the rests."""
    shortest = min(len(dialog) for dialog in dialogs)
    common = next((k for k in range(shortest) if len({repr(dialog[k]) for dialog in dialogs}) > 1), shortest)
    while common and dialogs[0][common - 1].role not in ("user", "ipython"):
        common -= 1
    return Preference(dialogs[0][:common], tuple(dialog[common:] for dialog in dialogs), rating, tools)


def _from_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> Dialog | Preference:
    values = {key: _joined(row, column) for key, column in columns.items() if key != "end_marker"}
    marker = columns.get("end_marker", "")
    system = (Message("system", values["system"]),) if values.get("system") else ()
    prompt = (*system, Message("user", values["user"]))

    def response(text: str) -> tuple[Message, ...]:
        return (Message("assistant", text.removesuffix(marker).rstrip()),)

    if "assistant" in values:
        return Dialog((*prompt, *response(values["assistant"])))
    names = _responses_in(values)
    return Preference(prompt, tuple(response(values[name]) for name in names), _rating(values.get("rating")))


def _joined(row: Mapping[str, Any], column: str) -> str:
    if column in row:
        return _text(row[column], column).strip()
    parts = [_text(_reach(row, path), path).strip() for path in column.split("+")]
    return "\n\n".join(part for part in parts if part)


def _reach(row: Mapping[str, Any], path: str) -> Any:
    value: Any = row
    for key in [path] if path in row else path.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise BadRow(f"no column {path!r}; the row has {list(row)}")
    return value


def _messages(raw: Any) -> tuple[Message, ...]:
    """OpenAI's messages. An assistant's turn goes on after a tool call, and unless the user is next."""
    if not isinstance(raw, list) or not raw:
        raise BadRow(f"messages must be a list that is not empty, not {raw!r:.80}")
    for number, message in enumerate(raw, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRow(f"message {number} must be a mapping with role and content, not {message!r:.80}")
    roles = [_ROLE_NAMES.get(message["role"], message["role"]) for message in raw]
    followed = [role in ("assistant", "ipython") for role in roles[1:]] + [False]
    messages = []
    for message, role, more in zip(raw, roles, followed, strict=True):
        calls = tuple(_tool_call(call) for call in message.get("tool_calls") or ())
        turn_ends = role != "assistant" or not (calls or more)
        messages.append(Message(role, _content(message.get("content")), calls, turn_ends))
    return tuple(messages)


def trained_mark(message: Mapping[str, Any]) -> bool | None:
    """Whether a message says that it is trained; None: it does not say. Raises `BadRow` for contradictions
    and for weights between."""
    said: dict[str, bool] = {}
    for key in _MARKS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRow(f"{key}={value!r:.80} of a message: it must be true, false, 1 or 0")
        said[key] = bool(value) != key.startswith("mask")
    if len(set(said.values())) > 1:
        shown = ", ".join(f"{key}={message[key]!r}" for key in said)
        raise BadRow(f"a message says that it is trained and that it is not: {shown}")
    return next(iter(said.values()), None)


def _content(content: Any) -> str:
    """A text, or OpenAI's list of text parts."""
    if isinstance(content, list):
        kinds = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content}
        if kinds - {"text"}:
            raise BadRow(f"content has parts of type {sorted(map(str, kinds))}; only text can be trained on")
        content = "".join(_text(part.get("text"), "text") for part in content)
    return _text("" if content is None else content, "content").strip()


def _tool_call(call: Any) -> ToolCall:
    function = call.get("function") or call if isinstance(call, Mapping) else {}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"a tool call needs a function with a name, not {call!r:.80}")
    arguments = function.get("arguments") or {}
    if (
        isinstance(arguments, str)
        and function["name"] == CODE_INTERPRETER
        and not arguments.lstrip().startswith("{")
    ):
        return ToolCall(CODE_INTERPRETER, {"code": arguments})
    parameters = ToolCall("", arguments).parameters
    # Arrow gives every mapping of a column the same keys, null where a row had none
    return ToolCall(
        function["name"], {name: value for name, value in parameters.items() if value is not None}
    )


def _tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = row.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow(f"tools are not JSON: {error}") from None
    if not isinstance(tools, list):
        raise BadRow(f"tools must be a list, not {tools!r:.80}")
    return tuple(tools)


def _responses_in(row: Mapping[str, Any]) -> list[str]:
    """Names of the ranked responses, best first; not every row has been edited."""
    return ["edited", "chosen", "rejected"] if row.get("edited") else ["chosen", "rejected"]


def _list_of(value: Any, role: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise BadRow(f"a text or a list of messages is wanted, not {value!r:.80}")
    return value


def _rating(value: Any) -> str | None:
    return _text(value, "rating").strip().lower().replace(" ", "_") if value else None


def _column(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise BadRow(f"no column {name!r}; the row has {list(row)}")
    return row[name]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name!r} is {type(value).__name__}, not text")
    return value
