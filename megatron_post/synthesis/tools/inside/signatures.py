"""Runs in the sandbox, and imports nothing of the package: JSON schemas of the functions in functions.py.

A definition follows from a function's signature and docstring, which may be in the style of Google, NumPy or
reStructuredText. The file is parsed and not run.
"""

import ast
import json
from typing import Any

_SIMPLE = {
    "int": "integer",
    "float": "number",
    "str": "string",
    "bool": "boolean",
    "None": "null",
    "list": "array",
    "List": "array",
    "dict": "object",
    "Dict": "object",
}
_ARRAYS = ("list", "List", "Sequence", "Iterable", "set", "Set")
_OBJECTS = ("dict", "Dict", "Mapping")


class NoSchema(Exception):
    """A function cannot be written as a JSON schema. The text is the reason."""


def schema_of(annotation: ast.expr | None) -> dict[str, Any]:
    """The JSON schema of an annotation. Raises `NoSchema`."""
    match annotation:
        case None:
            raise NoSchema("a parameter has no annotation")
        case ast.Constant(value=None):
            return {"type": "null"}
        case ast.Constant(value=str() as text):  # an annotation in quotes
            return schema_of(ast.parse(text, mode="eval").body)
        case ast.Name(id="Any") | ast.Attribute(attr="Any"):
            return {}
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in _SIMPLE:
            return {"type": _SIMPLE[name]}
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return _any_of([schema_of(left), schema_of(right)])
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=inner):
            return _generic(name, inner.elts if isinstance(inner, ast.Tuple) else [inner])
    raise NoSchema(f"the annotation {ast.unparse(annotation)} has no JSON schema")


def _generic(name: str, inner: list[ast.expr]) -> dict[str, Any]:
    match name, inner:
        case "Optional", [one]:
            return _any_of([schema_of(one), {"type": "null"}])
        case "Union", _:
            return _any_of([schema_of(each) for each in inner])
        case "Literal", _:
            return {"enum": [_constant(each) for each in inner]}
        case _, [one] if name in _ARRAYS:
            return {"type": "array", "items": schema_of(one)}
        case "tuple" | "Tuple", [one, ast.Constant(value=value)] if value is ...:
            return {"type": "array", "items": schema_of(one)}
        case _, [ast.Name(id="str"), one] if name in _OBJECTS:
            values = schema_of(one)
            return {"type": "object", **({"additionalProperties": values} if values else {})}
    raise NoSchema(f"the annotation {name}[...] has no JSON schema")


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """A schema for any of several, which is a list of types if they are nothing else."""
    parts = [part for schema in schemas for part in schema.get("anyOf", [schema])]
    if all(list(part) == ["type"] for part in parts):
        types = [each for part in parts for each in _as_list(part["type"])]
        return {"type": list(dict.fromkeys(types))}
    return {"anyOf": parts}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def definition(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, Any]:
    """The definition of a function in OpenAI's form. Raises `NoSchema`."""
    import docstring_parser

    arguments = function.args
    if isinstance(function, ast.AsyncFunctionDef):
        raise NoSchema("it is a coroutine")
    if arguments.posonlyargs or arguments.vararg or arguments.kwarg:
        raise NoSchema("a parameter cannot be given by its name")
    text = ast.get_docstring(function)
    if not text:
        raise NoSchema("there is no docstring")
    if function.decorator_list:
        raise NoSchema("it has a decorator, which may change its signature")
    try:
        about = docstring_parser.parse(text)
    except Exception as error:  # such as an IndexError for `:param:` without a name
        raise NoSchema(f"the docstring cannot be parsed: {error}") from None
    described = {each.arg_name: " ".join((each.description or "").split()) for each in about.params}
    padding = [None] * (len(arguments.args) - len(arguments.defaults))
    defaults = dict(
        zip(
            (each.arg for each in (*arguments.args, *arguments.kwonlyargs)),
            (*padding, *arguments.defaults, *arguments.kw_defaults),
            strict=True,
        )
    )
    properties = {}
    for each in (*arguments.args, *arguments.kwonlyargs):
        schema = schema_of(each.annotation)
        if described.get(each.arg):
            schema["description"] = described.pop(each.arg)
        if (default := defaults[each.arg]) is not None:
            schema["default"] = _constant(default)
        properties[each.arg] = schema
    if unknown := described.keys() - properties.keys():
        raise NoSchema(f"the docstring describes {sorted(unknown)[0]!r}, which is no parameter")
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": " ".join((about.short_description or text).split()),
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": [name for name in properties if defaults[name] is None],
                "additionalProperties": False,
            },
        },
    }


def _constant(value: ast.expr) -> Any:
    try:
        found = ast.literal_eval(value)
        json.dumps(found, allow_nan=False)
    except (ValueError, TypeError):
        raise NoSchema(f"{ast.unparse(value)} is no JSON") from None
    return found


def main() -> None:
    with open("functions.py", encoding="utf-8", errors="surrogatepass") as file:
        tree = ast.parse(file.read())
    tools: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            tools.pop(node.name, None)  # a function replaces an earlier one of its name
            left_out.pop(node.name, None)
            try:
                tools[node.name] = definition(node)
            except (NoSchema, SyntaxError, ValueError, TypeError, RecursionError) as error:
                left_out[node.name] = str(error).partition("\n")[0]
    print(json.dumps({"tools": list(tools.values()), "left_out": left_out}))


if __name__ == "__main__":
    main()
