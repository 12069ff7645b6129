"""Calls of unseen functions, single, nested and parallel, validated and executed."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_post.config.section import Count, Distinct, Name, Section
from megatron_post.data.dialog import BUILT_IN_TOOLS, BadRow, Message, ToolCall
from megatron_post.data.row_keys import Keys
from megatron_post.data.row_tools import tools_of
from megatron_post.data.rows import json_object
from megatron_post.synthesis.columns import column
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task
from megatron_post.synthesis.tools.functions import Tool, called, defined_in
from megatron_post.synthesis.tools.trajectory import asked_for, check_answer

VERSION = 1
MODELS = ("author", "judge")
SANDBOX = True
_CALLS = re.compile(r"<calls>(.*?)</calls>", re.DOTALL)
_REFERENCE = '"$output":'

Kind = Literal["single", "nested", "parallel"]
Calls = list[dict[str, Any]]


class Settings(Section):
    source: Name = Field("text", description="column of a Python file that has the functions")
    definitions: Name = Field("tools", description="column of JSON schemas of functions, if a row has them")
    functions: Count = Field(4, description="functions of a row that are offered, at most, drawn at random")
    kinds: Annotated[tuple[Kind, ...], Distinct] = Field(
        ("single", "nested", "parallel"),
        min_length=1,
        description="kinds of calls, of which one is drawn for each row. nested needs functions with a body",
    )
    output: Count = Field(2000, description="largest number of characters of a function's output")
    calls: Count = Field(4, ge=2, le=100, description="calls that answer one request, at most")
    corrections: int = Field(
        1, ge=0, le=100, description="times that wrong calls may be written again. They are not in the row"
    )


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    settings = task.settings
    tools, source = await _functions(row, task)
    drawn = sorted(task.random.sample(range(len(tools)), min(settings.functions, len(tools))))
    tools = [tools[number] for number in drawn]
    kinds = [kind for kind in settings.kinds if source is not None or kind != "nested"]
    if not kinds:
        raise Dropped("functions without a body cannot be nested")
    await called(task, tools, [], source)  # the definitions, before a model is asked
    kind = task.random.choice(kinds)
    request, calls = await _written(task, tools, source, kind)
    turns = _turns(calls, kind)
    if source is not None:
        asked = task.prompt("answer", request=request, calls=[_shown(call) for call in calls])
        reply = await task.ask("answer", asked)
        if reply.finish != "stop" or not reply.text.strip():
            raise Dropped("the answer is cut off or empty")
        turns.append(Message("assistant", reply.text.strip()))
        await check_answer(task, request, turns)
    return [
        Row(
            [Message("user", request), *turns],
            capability="tools",
            kind=kind if source is not None else f"{kind}, not executed",
            tools=tools,
            unique=request,
        )
    ]


async def _functions(row: dict[str, Any], task: Task[Settings]) -> tuple[list[Tool], str | None]:
    """The definitions of a row, and the file with their bodies, or None.

    Raises `BadRow` for definitions in another form, and `Dropped` if there are none.
    """
    settings = task.settings
    given = row.get(settings.definitions)
    source = (
        None if given and row.get(settings.source) is None else column(row, settings.source, key="source")
    )
    if not given:
        assert source is not None
        tools = await defined_in(task, source)
    else:
        tools = list(tools_of(Keys({"tools": given})))
        for tool in tools:
            function = tool.get("function")
            if tool.get("type") in BUILT_IN_TOOLS or not isinstance(function, dict):
                raise BadRow(f"{settings.definitions}: {tool!r:.80} is not a function")
            if not isinstance(function.get("name"), str) or not isinstance(
                function.get("parameters", {}), dict
            ):
                raise BadRow(
                    f"{settings.definitions}: {tool!r:.80} has no name, or parameters without a schema"
                )
    if not tools:
        raise Dropped("there is no function that can be described")
    return tools, source


async def _written(
    task: Task[Settings], tools: list[Tool], source: str | None, kind: Kind
) -> tuple[str, Calls]:
    """A request and its calls, with their real arguments and outputs.

    The author gets the fault of wrong calls, and may correct them. Raises `Dropped` if they stay wrong.
    """
    shown = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    dialog = [Message("user", task.prompt("write", functions=shown, kind=kind, most=task.settings.calls))]
    for attempt in range(task.settings.corrections + 1):
        reply = await task.ask("correct" if attempt else "write", dialog)
        request = asked_for(reply)
        fault = ""
        try:
            calls = _parsed(reply.text, kind, task.settings.calls)
            result = await called(task, tools, calls, source)
            fault = result.error
        except ValueError as error:
            fault = str(error)
        task.count("calls", "wrong" if fault else "right")
        if not fault:
            if any(len(_output_of(call)) > task.settings.output for call in result.calls):
                raise Dropped("the output of a call is too long")
            names = [call["name"] for call in calls]
            return request, [{"name": name, **call} for name, call in zip(names, result.calls, strict=True)]
        dialog += [reply.message, Message("user", task.prompt("correct", fault=fault))]
    raise Dropped("the calls are wrong", fault)


def _parsed(text: str, kind: Kind, most: int) -> Calls:
    """The calls in a reply. Raises `ValueError` with the fault, if they are not of this kind."""
    found = _CALLS.findall(text)
    if len(found) != 1:
        raise ValueError("the calls are not between <calls> and </calls>")
    try:
        calls = json.loads(found[0], object_pairs_hook=json_object)
        json.dumps(calls, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the calls are not JSON: {error}") from None
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and set(call) == {"name", "arguments"} and isinstance(call["name"], str)
        for call in calls
    ):
        raise ValueError("the calls are not a list of objects with a name and arguments")
    texts = [json.dumps(call, sort_keys=True) for call in calls]
    has_reference = any(_REFERENCE in text for text in texts)
    if kind == "single" and len(calls) != 1:
        raise ValueError("there must be exactly one call")
    if kind != "single" and not 2 <= len(calls) <= most:
        raise ValueError(f"there must be 2 to {most} calls")
    if len(set(texts)) < len(texts):
        raise ValueError("two calls are the same")
    if has_reference != (kind == "nested"):
        raise ValueError(
            "no call uses the output of another" if kind == "nested" else "a call uses the output of another"
        )
    return calls


def _turns(calls: Calls, kind: Kind) -> list[Message]:
    """The calls with their outputs. Parallel calls come before all outputs."""
    messages = [
        Message("assistant", "", (ToolCall(call["name"], call["arguments"]),), end_of_turn=False)
        for call in calls
    ]
    if any("output" not in call for call in calls):
        return messages
    outputs = [Message("ipython", _output_of(call)) for call in calls]
    if kind == "parallel":
        return [*messages, *outputs]
    return [message for pair in zip(messages, outputs, strict=True) for message in pair]


def _shown(call: dict[str, Any]) -> str:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return f"{call['name']}({arguments}) -> {_output_of(call)}"


def _output_of(call: dict[str, Any]) -> str:
    """The output as the model gets it, or nothing if the call was not executed."""
    return json.dumps(call["output"], ensure_ascii=False) if "output" in call else ""
