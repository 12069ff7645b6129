"""Prints which modules of a repository many of its files import, as JSON, and runs none of them.

python3 repository.py NAME LEAST. files.json has the text of each Python file by its path. For each module
that at least LEAST other files import, it prints these files, and the names of the module that they use.
"""

import ast
import json
import sys
from typing import Any

_MOST = 100  # modules that are printed, spread evenly over the repository
_ROOTS = ("src", "lib")  # directories that hold packages and are none


class _Modules:
    """The files of a repository by the names under which they are imported."""

    def __init__(self, name: str, paths: list[str]) -> None:
        """name: of the repository, which is that of its package where __init__.py lies at the top."""
        self._packages = {path.rpartition("/")[0] for path in paths if path.split("/")[-1] == "__init__.py"}
        self._repository = name
        self.path_of: dict[str, str] = {}
        self.name_of = {path: self._name(path) for path in paths}
        for path, dotted in self.name_of.items():
            self.path_of.setdefault(dotted, path)

    def _name(self, path: str) -> str:
        directory, _, file = path.rpartition("/")
        names = directory.split("/") if directory else []
        first = 1 if names and names[0] in _ROOTS else 0
        if directory in self._packages:  # its name begins with the outermost package that holds it
            first = len(names)
            while first and "/".join(names[:first]) in self._packages:
                first -= 1
        inner = ([self._repository] if "" in self._packages else []) + names[first:]
        return ".".join([*inner, *([] if file == "__init__.py" else [file.removesuffix(".py")])])

    def found(self, importer: str, dotted: str) -> str | None:
        """The file that an import means: by its whole name, or beside the importer where that is a script."""
        directory = importer.rpartition("/")[0]
        beside = f"{directory}/{dotted}.py" if directory else f"{dotted}.py"
        if directory not in self._packages and beside in self.name_of:
            return beside
        return self.path_of.get(dotted)

    def base(self, importer: str, node: ast.ImportFrom) -> str:
        """The absolute name of what stands behind `from`."""
        if not node.level:
            return node.module or ""
        names = self.name_of[importer].split(".")
        above = node.level - (1 if importer.split("/")[-1] == "__init__.py" else 0)
        names = names[: max(len(names) - above, 0)]
        return ".".join([*names, *([node.module] if node.module else [])])


def uses(importer: str, tree: ast.Module, modules: _Modules) -> dict[str, set[str]]:
    """The files that one file imports, and the names that it uses of each."""
    found: dict[str, set[str]] = {}
    bound: dict[str, str] = {}  # what stands before a dot -> file
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if path := modules.found(importer, alias.name):
                    found.setdefault(path, set())
                    bound[alias.asname or alias.name] = path
        elif isinstance(node, ast.ImportFrom):
            base = modules.base(importer, node)
            for alias in node.names:
                if inner := modules.found(importer, f"{base}.{alias.name}" if base else alias.name):
                    found.setdefault(inner, set())
                    bound[alias.asname or alias.name] = inner
                elif path := modules.found(importer, base):
                    found.setdefault(path, set()).add(alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (path := bound.get(_dotted(node.value))):
            found[path].add(node.attr)
    found.pop(importer, None)
    return found


def _dotted(node: ast.expr) -> str:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def main() -> None:
    from definitions import defined  # it lies beside this script in the sandbox alone

    name, least = sys.argv[1], int(sys.argv[2])
    with open("files.json", encoding="utf-8") as file:
        texts: dict[str, str] = json.load(file)
    trees: dict[str, ast.Module] = {}
    for path, text in texts.items():
        try:
            trees[path] = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    modules = _Modules(name, list(trees))
    importers: dict[str, dict[str, set[str]]] = {}
    for path, tree in trees.items():
        for target, names in uses(path, tree, modules).items():
            importers.setdefault(target, {})[path] = names
    found: dict[str, Any] = {}
    for path in sorted(importers):
        used = set[str]().union(*importers[path].values()) & defined(trees[path])
        if len(importers[path]) >= least and used and not path.endswith("__init__.py"):
            found[path] = {"importers": sorted(importers[path]), "names": sorted(used)}
    step = -(-len(found) // _MOST) or 1
    unparsed = sorted(set(texts) - set(trees))
    print(json.dumps({"modules": dict(list(found.items())[::step]), "unparsed": unparsed[:_MOST]}))


if __name__ == "__main__":
    main()
