"""Reads tools and tool calls in OpenAI's form, its older form with functions, and ShareGPT's form."""

from collections.abc import Mapping
from typing import Any

from megatron_post.data.dialog import CODE_INTERPRETER, BadRow, ToolCall
from megatron_post.data.row_keys import Keys, as_list, from_json


def tools_of(row: Keys, mapped: Any = None) -> tuple[dict[str, Any], ...]:
    """The row's `tools`, or `functions` in OpenAI's older form, as a list or its JSON text.

    mapped: the value of the column that the source names for tools. Raises `BadRow`.
    """
    values = {name: row.get(name) for name in ("tools", "functions") if name in row}
    values |= {} if mapped is None else {"the mapped column": mapped}
    found = [[_wrapped(tool) for tool in _list(value, name)] for name, value in values.items()]
    if any(tools != found[0] for tools in found[1:]):
        raise BadRow(f"{' and '.join(values)} contradict each other")
    tools = tuple(found[0]) if found else ()
    for tool in tools:
        _note_unused(tool, row)
    return tools


def calls_of(message: Keys) -> tuple[ToolCall, ...]:
    """The calls in a message's `tool_calls`, or in the older `function_call`. Raises `BadRow`."""
    if not message.among(("tool_calls", "function_call")):
        return ()
    calls = calls_in(message.get("tool_calls"), message)
    older = calls_in(message.get("function_call"), message)
    if calls and older and calls != older:
        raise BadRow("`tool_calls` and `function_call` contradict each other")
    return calls or older


def calls_in(raw: Any, message: Keys) -> tuple[ToolCall, ...]:
    """The calls of a list, of a single call, or of the JSON text of either. Raises `BadRow`."""
    raw = as_list(from_json(raw, "tool calls"))
    calls = raw if isinstance(raw, list) else [] if raw is None else [raw]
    return tuple(_call(_read(call, "tool calls"), message) for call in calls)


def _call(call: Any, message: Keys) -> ToolCall:
    if not isinstance(call, Mapping):
        raise BadRow(f"a tool call needs a function with a name, not {call!r:.80}")
    keys = message.nested(call, "tool_calls.")
    function = keys.get("function")
    inner = keys.nested(function, "function.") if isinstance(function, Mapping) else keys
    if not isinstance(inner.peek("name"), str):
        raise BadRow(f"a tool call needs a function with a name, not {call!r:.80}")
    if (kind := keys.get("type")) not in (None, "function"):
        raise BadRow(f"a tool call of type {kind!r} cannot be written; only functions can be called")
    name, arguments = inner.get("name"), inner.one_of("arguments", "parameters")
    arguments = {} if arguments in (None, "", [], {}) else arguments
    if name == CODE_INTERPRETER and isinstance(arguments, str) and not arguments.lstrip().startswith("{"):
        return ToolCall(name, {"code": arguments})
    return ToolCall(name, ToolCall("" if name == CODE_INTERPRETER else name, arguments).parameters)


def _read(value: Any, name: str) -> Any:
    """A tool or a call, parsed if it is a JSON text. Raises `BadRow`."""
    return from_json(value, name) if isinstance(value, str) else value


def _list(value: Any, name: str) -> list[dict[str, Any]]:
    tools = as_list(from_json(value, name))
    tools = [] if tools is None else tools
    tools = [_read(tool, name) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"{name} must be a list of mappings, not {tools!r:.80}")
    return tools


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    """The tool in OpenAI's form, in which a function is the value of `function`."""
    if "name" not in tool or "function" in tool or tool.get("type", "function") != "function":
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _note_unused(tool: Any, row: Keys) -> None:
    """Count keys of a function that the template does not render. `Dialog` refuses invalid tools."""
    place, value = "tools.", tool
    for used in (
        ("type", "function"),
        ("name", "description", "parameters"),
        ("type", "properties", "required"),
    ):
        if not isinstance(value, Mapping):
            return
        keys = row.nested(value, place)
        for key in used:
            keys.get(key)
        place, value = f"{place}{used[-1]}.", value.get(used[-1])
