"""Prints the syntax tree of main.py as a list of labels in JSON, without what does not change its meaning.

Names that the program gives, docstrings and annotations are left out.
"""

import ast
import builtins
import json
from collections.abc import Iterator
from typing import Any

_KEPT = 40  # characters of a constant
_DOCUMENTED = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LEFT_OUT = ("annotation", "returns", "ctx", "type_comment", "type_params")
_BUILT_IN = frozenset(dir(builtins))


def _label(node: ast.AST) -> str:
    match node:
        case ast.Constant(value):
            return repr(value)[:_KEPT]
        case ast.Name(name):
            return name if name in _BUILT_IN else "Name"
        case ast.Attribute(attr=name) | ast.alias(name=name):
            return f".{name}"
        case ast.AnnAssign():
            return "Assign"
        case _:
            return type(node).__name__


def _children(node: Any) -> Iterator[ast.AST]:
    has_docstring = isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None
    for field, value in ast.iter_fields(node):
        if field not in _LEFT_OUT:
            inner = value if isinstance(value, list) else [value]
            start = 1 if field == "body" and has_docstring else 0
            yield from (child for child in inner[start:] if isinstance(child, ast.AST))


def main() -> None:
    with open("main.py", encoding="utf-8") as file:
        waiting: list[ast.AST] = [ast.parse(file.read())]
    labels = []
    while waiting:  # without recursion, so that a deep tree needs no deep stack
        node = waiting.pop()
        labels.append(_label(node))
        waiting += reversed(list(_children(node)))
    print(json.dumps(labels))


if __name__ == "__main__":
    main()
