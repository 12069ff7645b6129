"""Calls of functions: which fit their definitions and their kind, and what their outputs are."""

import json
import re
from typing import Any

import pytest

from megatron_post.synthesis.tools.inside.schemas import check_arguments, fault_of
from tests.scripted_server import Answer, Body
from tests.unit.synthesis.tools.conftest import ToolPlace

PACKAGES = [
    *("jsonschema", "docstring_parser", "attr", "attrs", "referencing", "rpds"),
    *("jsonschema_specifications", "typing_extensions"),
]
SOURCE = '''
"""{case}"""
import time

def temperature(city: str) -> dict:
    """The temperature of a city in {case}.

    Args:
        city: Its name.
    """
    print("this is no output")
    return {{"city": city, "celsius": {{"Oslo": 10, "Rome": 20}}[city]}}

def to_fahrenheit(celsius: float) -> float:
    """Convert a temperature.

    Args:
        celsius: In degrees.
    """
    return celsius * 9 / 5 + 32

def now() -> int:
    """The time."""
    return time.time_ns()

def long(n: int) -> str:
    """A text of n letters."""
    return n * "x"

def nothing() -> object:
    """An object that is no JSON."""
    return object()
'''


def _call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


OSLO, ROME = _call("temperature", city="Oslo"), _call("temperature", city="Rome")
WARM = _call("to_fahrenheit", celsius={"$output": 1, "key": "celsius"})


def author(replies: dict[int, list[Any]]) -> Answer:
    """The n-th try at a case gives the n-th of its replies: calls, or the whole text of a reply."""

    def answer(body: Body) -> str:
        messages = body["messages"]
        first = messages[0]["content"]
        number = next(number for number in sorted(replies, reverse=True) if f"case {number}" in first)
        if "Verdict:" in first:
            return "Verdict: supported"
        if first.startswith("A user asked:"):
            return "Done."
        tries = replies[number]
        reply = tries[min(len(messages) // 2, len(tries) - 1)]
        if isinstance(reply, str):
            return reply
        return f"<request>Do case {number}.</request>\n<calls>{json.dumps(reply)}</calls>"

    return answer


def _text(number: int, calls: str) -> str:
    return f"<request>Do case {number}.</request>\n<calls>{calls}</calls>"


def _rows(replies: dict[int, list[Any]]) -> list[dict[str, Any]]:
    return [{"text": SOURCE.format(case=f"case {number}")} for number in replies]


def _run(place: ToolPlace, kind: str, replies: dict[int, list[Any]], **values: Any) -> None:
    rows = values.pop("rows", _rows(replies))
    place.run(
        "tool_functions", author(replies), rows=rows, packages=PACKAGES, kinds=[kind], functions=5, **values
    )


def test_single_calls_fit_their_definitions_and_run(tool_place: ToolPlace) -> None:
    replies = {
        1: [[OSLO]],
        2: [[_call("temperature", city=3)], [OSLO]],  # it is corrected
        3: [[_call("temperature", city=3)]],
        4: [[_call("temperature")]],
        5: [[_call("weather", city="Oslo")]],
        6: [[_call("temperature", city="Oslo", unit="K")]],
        7: [[_call("temperature", city="Paris")]],
        8: [[_call("now")]],
        9: [[_call("nothing")]],
        10: [[OSLO, ROME]],
        11: ["<request>case 11</request>"],
        12: ["<request>case 12</request><calls>[{</calls>"],
        13: [[{"name": "temperature"}]],
        14: ["NONE"],
        15: [_text(15, '[{"name": "temperature", "arguments": {"city": "Rome", "city": "Oslo"}}]')],
        16: [_text(16, '[{"name": "to_fahrenheit", "arguments": {"celsius": 1e999}}]')],
        17: [_text(17, '[{"name": "to_fahrenheit", "arguments": {"celsius": NaN}}]')],
        18: [_text(18, '[{"name": "temperature", "arguments": "Oslo"}]')],
        19: [_text(19, "[" * 5000)],
        20: [[_call("long", n=3000)]],
    }
    _run(tool_place, "single", replies)
    wrong = ("calls", "the calls are wrong")
    assert tool_place.dropped() == {
        **dict.fromkeys((3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 15, 16, 17, 18, 19), wrong),
        20: ("calls", "the output of a call is too long"),
        8: ("call", "a call has another output when it runs again"),
        14: ("write", "nothing to ask for"),
    }
    first, second = tool_place.rows()
    assert first["messages"][2]["content"] == '{"city": "Oslo", "celsius": 10}'
    assert [m["role"] for m in first["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert first["kind"] == second["kind"] == "single"
    names = [tool["function"]["name"] for tool in first["tools"]]
    assert names == ["temperature", "to_fahrenheit", "now", "long", "nothing"]
    details = [json.loads(line) for line in (tool_place.output / "dropped.jsonl").read_text().splitlines()]
    found = {int(line["source"].rpartition(":")[2]): line["detail"] for line in details}
    assert "3 is not of type 'string'" in found[3] and "'city' is a required property" in found[4]
    assert "there is no function weather" in found[5] and "('unit' was unexpected)" in found[6]
    assert found[7] == "KeyError: 'Paris'" and "JSON serializable" in found[9]


def test_nested_calls_use_outputs(tool_place: ToolPlace) -> None:
    replies = {
        1: [[OSLO, WARM]],
        2: [[OSLO, ROME]],
        3: [[OSLO, _call("to_fahrenheit", celsius={"$output": 2})]],
        4: [[OSLO, _call("to_fahrenheit", celsius={"$output": 1, "key": "kelvin"})]],
        5: [[OSLO, _call("to_fahrenheit", celsius={"$output": 1})]],  # an object is no number
        6: [[WARM]],
    }
    _run(tool_place, "nested", replies, corrections=0)
    assert tool_place.dropped() == dict.fromkeys(range(2, 7), ("calls", "the calls are wrong"))
    (row,) = tool_place.rows()
    calls = [message["tool_calls"][0]["function"] for message in row["messages"] if "tool_calls" in message]
    assert calls[1] == {"name": "to_fahrenheit", "arguments": '{"celsius": 10}'}
    assert [message["content"] for message in row["messages"] if message["role"] == "tool"][1] == "50.0"


def test_parallel_calls_come_before_their_outputs(tool_place: ToolPlace) -> None:
    replies = {1: [[OSLO, ROME]], 2: [[OSLO, WARM]], 3: [[OSLO, OSLO]], 4: [[OSLO]]}
    _run(tool_place, "parallel", replies, corrections=0)
    assert tool_place.dropped() == dict.fromkeys(range(2, 5), ("calls", "the calls are wrong"))
    (row,) = tool_place.rows()
    roles = ["user", "assistant", "assistant", "tool", "tool", "assistant"]
    assert [message["role"] for message in row["messages"]] == roles
    ids = [message["tool_calls"][0]["id"] for message in row["messages"][1:3]]
    assert [message["tool_call_id"] for message in row["messages"][3:5]] == ids
    (dialog,) = tool_place.dialogs()
    assert [message.end_of_turn for message in dialog.messages[1:3]] == [False, False]


def test_definitions_without_bodies_are_not_executed(tool_place: ToolPlace) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    tool = {"name": "songs", "description": "Trending songs of case 1", "parameters": schema}
    rows = [
        {"tools": [tool]},
        {"tools": [{**tool, "description": "case 2", "parameters": {"type": "no type"}}]},
        {"tools": [{**tool, "description": "case 3", "parameters": {**schema, "required": ["m"]}}]},
        {"tools": [{"description": "case 4"}]},
        {"tools": [tool, {**tool, "description": "twice"}]},
        {"text": "def f(:"},
        {"text": "x = 1"},
        {"tools": [tool], "text": "x = 1"},  # the file does not have the function
    ]
    replies = {1: [[_call("songs", n=10)]]}
    _run(tool_place, "single", replies, rows=rows)
    wrong = ("call", "the definitions are wrong")
    assert tool_place.dropped() == {
        2: wrong,
        3: wrong,
        4: ("(before the first step)", "`data pack` would refuse the row"),
        5: wrong,
        6: ("define", "the file does not parse"),
        7: ("define", "there is no function that can be described"),
        8: wrong,
    }
    (row,) = tool_place.rows()
    assert row["kind"] == "single, not executed" and row["messages"][-1]["tool_calls"]
    (dialog,) = tool_place.dialogs()
    assert not dialog.messages[-1].end_of_turn
    tool_place.output = tool_place.directory / "nested"
    _run(tool_place, "nested", replies, rows=rows[:1])
    assert tool_place.dropped()[1][1] == "functions without a body cannot be nested"


TREE = {"type": "object", "properties": {"name": {"type": "string"}, "child": {"$ref": "#/$defs/tree"}}}
SCHEMAS: dict[str, tuple[Any, str]] = {  # of the parameters, and what is wrong with them
    "a reference to itself": ({"$ref": "#"}, "refers to itself without an end"),
    "a circle": (
        {
            "type": "object",
            "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"not": {"$ref": "#/$defs/a"}}},
        },
        "refers to itself without an end",
    ),
    "a missing reference": ({"properties": {"a": {"items": {"$ref": "#/$defs/none"}}}}, "leads nowhere"),
    "a reference to the web": ({"properties": {"a": {"$ref": "http://a.example/x"}}}, "leads nowhere"),
    "no object": ({"type": "array"}, "its parameters are no object"),
    "a nested error": ({"properties": {"a": {"properties": {"b": {"type": "int"}}}}}, "'int' is not valid"),
    "a nested requirement": (
        {"properties": {"a": {"properties": {"b": {}}, "required": ["c"]}}},
        "c is required and not described",
    ),
    "required is no list": ({"required": 5}, "5 is not of type 'array'"),
    "properties are no object": ({"properties": ["a"]}, "['a'] is not of type 'object'"),
    "a tree": ({"properties": {"a": {"$ref": "#/$defs/tree"}}, "$defs": {"tree": TREE}}, ""),
    "nothing": ({}, ""),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_faults_of_schemas(name: str) -> None:
    pytest.importorskip("jsonschema")
    schema, fault = SCHEMAS[name]
    found = fault_of(schema)
    assert (fault in found) if fault else (found == "")


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name"],
}
CALLS: list[tuple[dict[str, Any], Any, str]] = [  # parameters, arguments, and what is wrong with these
    ({"properties": {"person": PERSON}}, {"person": {"name": "A", "tags": [1]}}, ""),
    ({"properties": {"person": PERSON}}, {"person": {"name": "A", "age": 3}}, "('age' was unexpected)"),
    ({"properties": {"person": PERSON}}, {"person": {}}, "'name' is a required property"),
    ({"properties": {"person": PERSON}}, {"person": {"name": "A", "tags": ["x"]}}, "['tags'][0]"),
    (
        {"properties": {"all": {"type": "array", "items": PERSON}}},
        {"all": [{"name": "A", "x": 1}]},
        "['all'][0]",
    ),
    ({"properties": {"a": {"type": "object"}}}, {"a": {"any": 1}}, ""),
    ({"properties": {"a": {"type": "integer"}}}, {"a": True}, "True is not of type 'integer'"),
    ({"properties": {"a": {}}, "additionalProperties": True}, {"b": 1}, ""),
    ({}, {"b": 1}, "('b' was unexpected)"),
    ({}, {}, ""),
    ({}, ["b"], "are no object"),
    ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, {"a": 1, "b": 2}, ""),
    ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, {"c": 1}, "('c' was unexpected)"),
    (
        {"properties": {"a": {"$ref": "#/$defs/tree"}}, "$defs": {"tree": TREE}},
        {"a": {"name": "A", "child": {"name": "B", "child": {"size": 1}}}},
        "['a']['child']['child']",
    ),
]


@pytest.mark.parametrize(("schema", "arguments", "fault"), CALLS)
def test_arguments_fit_their_schema_at_any_depth(schema: dict[str, Any], arguments: Any, fault: str) -> None:
    pytest.importorskip("jsonschema")
    assert fault_of(schema) == ""
    if not fault:
        check_arguments("f", schema, arguments)
        return
    with pytest.raises(ValueError, match=re.escape(fault)):
        check_arguments("f", schema, arguments)


def test_definitions_fit_the_bodies(tool_place: ToolPlace) -> None:
    def tool(**properties: Any) -> list[dict[str, Any]]:
        parameters = {"type": "object", "properties": properties, "required": ["a"]}
        return [{"name": "f", "description": "case 1", "parameters": parameters}]

    source = 'def f(a: int, b: int):\n    """case 1"""\n    return a\n'
    optional, number = source.replace("b: int", "b: int = 1"), {"type": "integer"}
    rows = [
        {"text": source, "tools": tool(a=number)},
        {"text": optional, "tools": tool(a=number, b=number, c=number)},
        {"text": optional, "tools": tool(a=number, b=number)},
    ]
    _run(tool_place, "single", {1: [[_call("f", a=1)]]}, rows=rows)
    details = [json.loads(line)["detail"] for line in (tool_place.output / "dropped.jsonl").open()]
    assert details == [
        "f: its schema does not fit its signature: missing a required argument: 'b'",
        "f: its schema does not fit its signature: got an unexpected keyword argument 'c'",
    ]
    assert len(tool_place.rows()) == 1


@pytest.mark.parametrize("body", ["import os; os._exit(0)", "import sys; sys.exit(3)"])
def test_a_file_that_ends_the_program(tool_place: ToolPlace, body: str) -> None:
    source = f'{body}\ndef f(a: int):\n    """Case: case 1."""\n'
    _run(tool_place, "single", {1: [[_call("f", a=1)]]}, rows=[{"text": source}])
    assert tool_place.dropped()[1][1] in (
        "the functions do not end as they should",
        "the definitions are wrong",
    )
