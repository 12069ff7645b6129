"""Runs in the sandbox, and imports nothing of the package: checks definitions of functions and calls them.

tools.json has the definitions, calls.json the calls, and functions.py, if it is there, the functions. An
argument `{"$output": 1}` stands for the output of the first call, and `{"$output": 1, "key": "name"}` for a
part of it.
The output is JSON: `definitions` are what is wrong with them, and `calls` have `arguments` and
`output`, or `error`.
"""

import contextlib
import json
import os
import random
import sys
import types
from pathlib import Path
from typing import Any

_FUNCTIONS = Path("functions.py")
_REFERENCE = "$output"


def faults_of(tools: list[dict[str, Any]], functions: dict[str, Any] | None) -> list[str]:
    """What is wrong with the definitions. functions: by name, or None if only the definitions are there."""
    import jsonschema

    found = []
    names = [tool["function"]["name"] for tool in tools]
    for tool in tools:
        name, schema = tool["function"]["name"], tool["function"].get("parameters") or {}
        try:
            jsonschema.Draft202012Validator.check_schema(schema)
        except jsonschema.SchemaError as error:
            found.append(f"{name}: {error.message}")
        if schema.get("type", "object") != "object":
            found.append(f"{name}: its parameters are no object")
        if missing := set(schema.get("required") or ()) - set(schema.get("properties") or ()):
            found.append(f"{name}: {sorted(missing)[0]} is required and not described")
        if names.count(name) > 1:
            found.append(f"{name} is defined twice")
        if functions is not None and not callable(functions.get(name)):
            found.append(f"{name} is not defined in the file")
    return found


def check_call(tools: list[dict[str, Any]], name: str, arguments: Any) -> None:
    """Raises `ValueError` for a call that does not fit its definition."""
    import jsonschema

    found = next((tool["function"] for tool in tools if tool["function"]["name"] == name), None)
    if found is None:
        raise ValueError(f"there is no function {name}")
    schema = found.get("parameters") or {}
    properties = schema.get("properties") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {name} are no object")
    if unknown := sorted(arguments.keys() - properties.keys()):
        raise ValueError(f"{name} has no parameter {unknown[0]}")
    errors = sorted(jsonschema.Draft202012Validator(schema).iter_errors(arguments), key=str)
    if errors:
        place = "".join(f"[{part!r}]" for part in errors[0].absolute_path)
        raise ValueError(f"{name}: the arguments{place}: {errors[0].message}"[:500])


def resolved(value: Any, outputs: list[Any]) -> Any:
    """A value in which references to outputs are replaced. Raises `ValueError` for a wrong one."""
    if isinstance(value, list):
        return [resolved(each, outputs) for each in value]
    if not isinstance(value, dict):
        return value
    if _REFERENCE not in value:
        return {key: resolved(each, outputs) for key, each in value.items()}
    number, keys = value[_REFERENCE], value.keys() - {_REFERENCE, "key"}
    if keys or type(number) is not int or not 1 <= number <= len(outputs):
        raise ValueError(f"{value} is no reference to the output of an earlier call")
    output = outputs[number - 1]
    if "key" not in value:
        return output
    try:
        return output[value["key"]]
    except (LookupError, TypeError):
        raise ValueError(f"the output of call {number} has no {value['key']!r}") from None


def run_all(
    tools: list[dict[str, Any]], calls: list[Any], functions: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The results of the calls, up to the first error."""
    found: list[dict[str, Any]] = []
    for call in calls:
        result: dict[str, Any] = {}
        found.append(result)
        try:
            arguments = resolved(call["arguments"], [each.get("output") for each in found[:-1]])
            check_call(tools, call["name"], arguments)
            result["arguments"] = json.loads(json.dumps(arguments))  # a function may change them
            if functions is not None:
                output = functions[call["name"]](**arguments)
                result["output"] = json.loads(json.dumps(output, allow_nan=False))
        except BaseException as error:  # whatever the functions do
            result["error"] = f"{type(error).__name__}: {error}"[:500]
            break
    return found


def load() -> dict[str, Any] | None:
    """The names of functions.py, or None if there is no such file. Raises what the file raises."""
    if not _FUNCTIONS.exists():
        return None
    module = types.ModuleType("functions")
    sys.modules["functions"] = module  # dataclasses look up annotations there
    code = compile(_FUNCTIONS.read_bytes(), _FUNCTIONS.name, "exec")
    exec(code, module.__dict__)
    return module.__dict__


def main() -> None:
    import jsonschema  # noqa: F401  # if it is missing, this fails before errors are hidden

    tools, calls = (json.loads(Path(f"{name}.json").read_bytes()) for name in ("tools", "calls"))
    random.seed(0)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)  # what the functions print is no output
    result: dict[str, Any]
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        try:
            functions = load()
        except BaseException as error:
            result = {"definitions": [f"the file cannot be run: {type(error).__name__}: {error}"[:500]]}
        else:
            result = {"definitions": faults_of(tools, functions)}
            result["calls"] = [] if result["definitions"] else run_all(tools, calls, functions)
    os.write(kept, json.dumps(result).encode())
    os._exit(0)  # no thread or handler of the functions runs on


if __name__ == "__main__":
    main()
