"""Runs in the sandbox, and imports nothing of the package: checks definitions of functions and calls them.

tools.json has the definitions, calls.json the calls, and functions.py, if it is there, the functions. An
argument `{"$output": 1}` stands for the output of the first call, and `{"$output": 1, "key": "name"}` for a
part of it.
The output is JSON: `definitions` are what is wrong with them, and `calls` have `arguments` and
`output`, or `error`.
"""

import contextlib
import inspect
import json
import os
import random
import sys
import types
from pathlib import Path
from typing import Any

_FUNCTIONS = Path("functions.py")
_REFERENCE = "$output"


def faults_of(schemas: list[tuple[str, Any]], functions: dict[str, Any] | None) -> list[str]:
    """What is wrong with the definitions, and how they differ from the functions.

    schemas: pairs of a name and the schema of its parameters. functions: by name, or None if only the
    definitions are there.
    """
    from schemas import fault_of  # the file beside this one

    names = [name for name, _ in schemas]
    found = [f"{name} is defined twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    for name, schema in schemas:
        try:
            fault = fault_of(schema) or ("" if functions is None else _misfit(schema, functions.get(name)))
        except RecursionError:
            fault = "its schema is nested too deeply"
        found += [f"{name}: {fault}"] if fault else []
    return found


def _misfit(schema: dict[str, Any], function: Any) -> str:
    """Why a function cannot be called as its schema says, or nothing."""
    if not callable(function):
        return "it is not defined in the file"
    try:
        signature = inspect.signature(function)
        for names in (schema.get("required", ()), schema.get("properties", ())):
            signature.bind(**dict.fromkeys(names))
    except (TypeError, ValueError) as error:
        return f"its schema does not fit its signature: {error}"
    return ""


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
    schemas: dict[str, Any], calls: list[Any], functions: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The results of the calls, up to the first error."""
    from schemas import check_arguments

    found: list[dict[str, Any]] = []
    for call in calls:
        result: dict[str, Any] = {}
        found.append(result)
        try:
            arguments = resolved(call["arguments"], [each.get("output") for each in found[:-1]])
            if call["name"] not in schemas:
                raise ValueError(f"there is no function {call['name']}")
            check_arguments(call["name"], schemas[call["name"]], arguments)
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
    schemas = [
        (tool["function"]["name"], tool["function"].get("parameters", {"type": "object"})) for tool in tools
    ]
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
            result = {"definitions": faults_of(schemas, functions)}
            result["calls"] = [] if result["definitions"] else run_all(dict(schemas), calls, functions)
    os.write(kept, json.dumps(result).encode())
    os._exit(0)  # no thread or handler of the functions runs on


if __name__ == "__main__":
    main()
