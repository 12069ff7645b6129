"""`Dialog` and `Preference`, which hold one row of a dataset and check it when they are made."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

RoleOfMessage = Literal["system", "user", "assistant", "ipython"]
Rating = Literal["significantly_better", "better", "slightly_better", "marginally_better"]

THINK = ("<think>", "</think>")  # rendered reasoning is between them
MAX_CHARACTERS = 4_000_000  # in one row; a 128K-token row has about 600,000
CODE_INTERPRETER = "code_interpreter"
SEARCH_TOOLS = ("brave_search", "wolfram_alpha")  # built in, called with one query
BUILT_IN_TOOLS = (*SEARCH_TOOLS, CODE_INTERPRETER)

# The roles that may follow a role, or the start of the dialog (None). An assistant message may follow another
# one only within a turn, that is, if the first ended with <|eom_id|>.
_MAY_FOLLOW: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "assistant", "ipython"),
    "ipython": ("assistant", "ipython"),
}


class BadRow(ValueError):
    """A row that cannot be trained on. The message is the reason, and the reader adds the file and line."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool.

    `arguments` is a mapping, its JSON text (as OpenAI writes it), or the code for code_interpreter.
    """

    name: str
    arguments: dict[str, Any] | str

    @property
    def parameters(self) -> dict[str, Any]:
        """The arguments as a mapping. Raises `BadRow` if they are not a JSON object."""
        if isinstance(self.arguments, dict):
            return self.arguments
        if self.name == CODE_INTERPRETER:
            return {"code": self.arguments}
        try:
            parameters = json.loads(self.arguments)
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRow(f"arguments of tool call {self.name!r} are not JSON: {error}") from None
        if not isinstance(parameters, dict):
            raise BadRow(f"arguments of tool call {self.name!r} are not a JSON object but {parameters!r:.80}")
        return parameters


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    end_of_turn: if False, the message ends with <|eom_id|>, and its turn continues with a tool's output.
    trained: whether an assistant's message may carry loss. If not, it is context like a user's message.
    reasoning: the assistant's reasoning before its answer, as far as it is rendered.
    Raises `BadRow` for an unknown role, content that is not text or not valid UTF-8, and wrong tool calls.
    """

    role: RoleOfMessage
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    end_of_turn: bool = True
    trained: bool = True
    reasoning: str = ""

    def __post_init__(self) -> None:
        if self.role not in get_args(RoleOfMessage):
            raise BadRow(
                f"role {self.role!r} is unknown; it must be one of {', '.join(get_args(RoleOfMessage))}"
            )
        if not isinstance(self.content, str):
            raise BadRow(f"content of the {self.role} message is {type(self.content).__name__}, not text")
        if self.reasoning and self.role != "assistant":
            raise BadRow(f"the {self.role} message has reasoning; only the assistant's can")
        try:
            # The tokenizer would fail later for such a text, without naming the file and the line.
            self.text.encode()
        except UnicodeEncodeError as error:
            raise BadRow(
                f"invalid UTF-8: the {self.role} message holds a lone surrogate at character {error.start}"
            ) from None
        if not self.end_of_turn and self.role != "assistant":
            raise BadRow(
                f"a {self.role} message cannot continue a turn; only an assistant's ends with <|eom_id|>"
            )
        if self.tool_calls:
            self._check_tool_calls()

    @property
    def text(self) -> str:
        """The text that is rendered, which is the reasoning (if any) and the content."""
        before, after = THINK
        return f"{before}\n{self.reasoning}\n{after}\n\n{self.content}" if self.reasoning else self.content

    def _check_tool_calls(self) -> None:
        if self.role != "assistant":
            raise BadRow(f"a {self.role} message calls a tool; only the assistant can")
        if len(self.tool_calls) > 1:
            raise BadRow(
                f"{len(self.tool_calls)} tool calls in one message; Llama 3's format allows one per message"
            )
        call = self.tool_calls[0]
        wanted = "query" if call.name in SEARCH_TOOLS else "code" if call.name == CODE_INTERPRETER else None
        if wanted and (list(call.parameters) != [wanted] or not isinstance(call.parameters[wanted], str)):
            raise BadRow(
                f"built-in tool {call.name} takes one text argument, {wanted!r}, not {call.parameters!r:.80}"
            )
        try:
            json.dumps([call.name, call.parameters], ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
            raise BadRow(f"tool call {call.name!r} cannot be written as JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class Dialog:
    """A conversation that ends with the assistant.

    `tools` holds functions in OpenAI's form, or `{"type": name}` for a built-in tool. Raises `BadRow` for
    roles out of order, an empty response, a dialog without a trained assistant message, and more than
    `MAX_CHARACTERS`.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        _check_tools(self.tools)
        _check_size(self.messages)
        _check_order(self.messages)
        if not any(message.role == "assistant" for message in self.messages):
            raise BadRow("no assistant message: nothing to train on")
        if self.messages[-1].role != "assistant":
            raise BadRow(
                f"the last message is from {self.messages[-1].role}; a dialog ends with the assistant"
            )
        _check_responses(self.messages)
        if not any(message.trained for message in self.messages if message.role == "assistant"):
            raise BadRow("nothing is trained: the row masks every assistant message")

    @property
    def turns(self) -> int:
        """Number of user messages."""
        return sum(message.role == "user" for message in self.messages)


@dataclass(frozen=True, slots=True)
class Preference:
    """Responses to one prompt, ranked best first (chosen > rejected, or edited > chosen > rejected).

    `rating` says how much better the chosen response is. Raises `BadRow` as `Dialog` does, and for equal
    responses.
    """

    prompt: tuple[Message, ...]
    responses: tuple[tuple[Message, ...], ...]
    rating: str | None = None
    tools: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        _check_tools(self.tools)
        if not self.prompt or self.prompt[-1].role not in ("user", "ipython"):
            raise BadRow("the prompt of a preference must end with a user or ipython message")
        if len(self.responses) not in (2, 3):
            raise BadRow(f"a preference ranks 2 or 3 responses, not {len(self.responses)}")
        _check_size([*self.prompt, *(message for response in self.responses for message in response)])
        for response in self.responses:
            if not response or response[-1].role != "assistant":
                raise BadRow("each response of a preference must end with an assistant message")
            if any(message.role == "user" for message in response):
                raise BadRow("a response holds a user message, so the responses differ before the last turn")
            _check_order((*self.prompt, *response))
            _check_responses(response)
        if len({repr(response) for response in self.responses}) < len(self.responses):
            raise BadRow("two responses of a preference are equal: there is nothing to prefer")
        if self.rating is not None and self.rating not in get_args(Rating):
            raise BadRow(
                f"rating {self.rating!r} is unknown; it must be one of {', '.join(get_args(Rating))}"
            )

    @property
    def turns(self) -> int:
        """Number of user messages. A response has none."""
        return sum(message.role == "user" for message in self.prompt)


def _check_tools(tools: Sequence[dict[str, Any]]) -> None:
    for tool in tools:
        if not isinstance(tool, dict):
            raise BadRow(f"a tool must be a mapping, not {tool!r:.80}")
        try:
            json.dumps(tool, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
            raise BadRow(f"tool {tool!r:.80} cannot be written as JSON: {error}") from None
        if tool.get("type") in BUILT_IN_TOOLS:
            continue
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(
                f"tool {tool!r:.80} is neither built in ({', '.join(BUILT_IN_TOOLS)} as `type`) nor a "
                '{"type": "function", "function": {"name": ...}}'
            )
        schema = function.get("parameters") or {}
        if not isinstance(schema, dict) or not isinstance(schema.get("properties") or {}, dict):
            raise BadRow(
                f"parameters of function {function['name']!r} are not a JSON schema with `properties`"
            )


def _check_size(messages: Sequence[Message]) -> None:
    characters = sum(len(message.text) for message in messages)
    if characters > MAX_CHARACTERS:
        raise BadRow(f"huge: {characters} characters, more than {MAX_CHARACTERS}")


def _check_order(messages: Sequence[Message]) -> None:
    previous: Message | None = None
    for number, message in enumerate(messages, start=1):
        allowed = _MAY_FOLLOW[previous.role if previous else None]
        if message.role not in allowed:
            after = f"after {previous.role}" if previous else "first"
            raise BadRow(f"message {number} is from {message.role}; {after} comes {' or '.join(allowed)}")
        if previous and previous.role == "assistant" == message.role and previous.end_of_turn:
            raise BadRow(
                f"message {number} is from assistant, whose turn had ended with message {number - 1}"
            )
        if previous and message.role == "user" and not previous.end_of_turn:
            raise BadRow(
                f"message {number} is from user, but message {number - 1} says that its turn continues"
            )
        previous = message


def _check_responses(messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant" and not message.tool_calls and not message.content.strip():
            raise BadRow(f"empty response: assistant message {number} is blank and calls no tool")
