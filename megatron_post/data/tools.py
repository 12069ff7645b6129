"""Writes tool definitions and tool calls in the form of Llama 3.1's prompts.

It follows Meta's published examples ("Llama 3.1 - Prompt Formats"). Built-in tools are enabled in the system
prompt and called as `brave_search.call(query="...")`. Other functions are described in a user message of
their own and called with a JSON object.
"""

import json
from collections.abc import Sequence
from typing import Any

from megatron_post.data.dialog import BUILT_IN_TOOLS, CODE_INTERPRETER, SEARCH_TOOLS, Message, ToolCall

ENVIRONMENT = "Environment: ipython\n"
BEFORE_FUNCTIONS = (
    "Answer the user's question by making use of the following functions if needed.\n"
    "If none of the function can be used, please say so.\n"
    "Here is a list of functions in JSON format:\n"
)
AFTER_FUNCTIONS = "\nReturn function calls in JSON format."


def with_tools(messages: tuple[Message, ...], tools: Sequence[dict[str, Any]]) -> tuple[Message, ...]:
    """The messages with descriptions of `tools`, in the system prompt and in a user message for functions."""
    if not tools:
        return messages
    searches = [tool["type"] for tool in tools if tool.get("type") in SEARCH_TOOLS]
    functions = [tool["function"] for tool in tools if tool.get("type") not in BUILT_IN_TOOLS]
    has_system = bool(messages) and messages[0].role == "system"
    system = messages[0].content if has_system else ""
    line = f"Tools: {', '.join(searches)}\n" if searches else "\n"
    announced = [Message("system", ENVIRONMENT + line + system)]
    if functions:
        described = "".join(_function_text(function) + "\n" for function in functions)
        announced.append(Message("user", BEFORE_FUNCTIONS + described + AFTER_FUNCTIONS))
    return (*announced, *messages[has_system:])


def call_text(call: ToolCall) -> str:
    """The text of a call after <|python_tag|>. A query is not escaped, as in Meta's code."""
    if call.name == CODE_INTERPRETER:
        return call.parameters["code"]
    if call.name in SEARCH_TOOLS:
        return f'{call.name}.call(query="{call.parameters["query"]}")'
    return _json({"type": "function", "name": call.name, "parameters": call.parameters})


def _function_text(function: dict[str, Any]) -> str:
    """A function's description as in Meta's prompt.

    There, `properties` is a list of objects with one key, and `required` is on one line.
    """
    schema = function.get("parameters") or {}
    properties = [_indented({name: value}, 16) for name, value in (schema.get("properties") or {}).items()]
    required = json.dumps(schema.get("required") or [], ensure_ascii=False)
    listed = ",".join("\n" + " " * 16 + text for text in properties)
    return (
        '{\n    "type": "function",\n    "function": {\n'
        f'        "name": {_json(function["name"])},\n'
        f'        "description": {_json(function.get("description") or "")},\n'
        '        "parameters": {\n            "type": "object",\n'
        f'            "properties": [{listed}\n            ],\n'
        f'            "required": {required}\n        }}\n    }}\n}}'
    )


def _indented(value: Any, width: int) -> str:
    return _json(value).replace("\n", "\n" + " " * width)


def _json(value: Any) -> str:
    return json.dumps(value, indent=4, ensure_ascii=False)
