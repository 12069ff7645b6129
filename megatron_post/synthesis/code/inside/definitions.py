"""Prints the names that main.py defines at its top level as a list in JSON. "*" stands for any other name."""

import ast
import json

_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def defined(tree: ast.Module) -> set[str]:
    """Names of functions, classes, imports and assignments, also below `if`, `try`, `with` and loops."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _NAMED):
            found.add("*" if node.name == "__getattr__" else node.name)
            continue
        if isinstance(node, ast.Import):
            found.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif not isinstance(node, _SCOPES):
            waiting += ast.iter_child_nodes(node)
    return found


def main() -> None:
    with open("main.py", encoding="utf-8") as file:
        print(json.dumps(sorted(defined(ast.parse(file.read())))))


if __name__ == "__main__":
    main()
