"""Tools in Llama 3.1's prompts: how they are announced, and how a call of one is written.

As in Meta's published examples ("Llama 3.1 - Prompt Formats"): built-in tools are switched on in the system
prompt and called as `brave_search.call(query="...")`; other functions are described in a user message of
their own, and called with a JSON object.
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
    """The messages with `tools` announced: in the system prompt, functions in a user message."""
    if not tools:
        return messages
    searches = [tool["type"] for tool in tools if tool.get("type") in SEARCH_TOOLS]
    functions = [tool["function"] for tool in tools if tool.get("type") not in BUILT_IN_TOOLS]
    has_system = bool(messages) and messages[0].role == "system"
    said = messages[0].content if has_system else ""
    line = f"Tools: {', '.join(searches)}\n" if searches else "\n"
    announced = [Message("system", ENVIRONMENT + line + said)]
    if functions:
        described = "".join(_function_text(function) + "\n" for function in functions)
        announced.append(Message("user", BEFORE_FUNCTIONS + described + AFTER_FUNCTIONS))
    return (*announced, *messages[has_system:])


def call_text(call: ToolCall) -> str:
    """What follows <|python_tag|>. A query is not escaped, as in Meta's code."""
    if call.name == CODE_INTERPRETER:
        return call.parameters["code"]
    if call.name in SEARCH_TOOLS:
        return f'{call.name}.call(query="{call.parameters["query"]}")'
    return _json({"type": "function", "name": call.name, "parameters": call.parameters})


def _function_text(function: dict[str, Any]) -> str:
    """A function as Meta's prompt has it: properties as a list of one-key objects, `required` on one line."""
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
