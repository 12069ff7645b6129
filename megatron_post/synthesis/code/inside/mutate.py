"""Prints mutants of main.py as a list in JSON: its own text first, written anew, then one with each error.

python3 mutate.py COUNT. Where there are more places than COUNT, they are spread evenly over the program.
"""

import ast
import json
import sys
from typing import Any

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add, ast.Pow: ast.Mult,
}  # fmt: skip


class _Mutator(ast.NodeTransformer):
    """Plants the error at place `wanted`, and counts the places."""

    def __init__(self, wanted: int) -> None:
        self._wanted, self.places = wanted, 0

    def _is_here(self) -> bool:
        self.places += 1
        return self.places - 1 == self._wanted

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        return node if isinstance(node.value, ast.Constant) else self._inner(node)  # a docstring

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.FormattedValue:
        node.value = self.visit(node.value)  # and not its format
        return node

    def visit_If(self, node: ast.If) -> ast.If:
        if any(isinstance(name, ast.Name) and name.id == "__name__" for name in ast.walk(node.test)):
            node.body = [self.visit(statement) for statement in node.body]
            return node
        return self._inner(node)

    def visit_Compare(self, node: ast.Compare) -> ast.Compare:
        other = _COMPARISONS[type(node.ops[0])]
        if self._is_here():
            node.ops[0] = other()
        return self._inner(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.BoolOp:
        if self._is_here():
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return self._inner(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.BinOp:
        return self._arithmetic(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AugAssign:
        return self._arithmetic(node)

    def visit_Return(self, node: ast.Return) -> ast.Return:
        nothing = node.value is None or (isinstance(node.value, ast.Constant) and node.value.value is None)
        if not nothing and self._is_here():
            return ast.Return(None)
        return self._inner(node)

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        value = node.value
        if isinstance(value, bool | int | str) and self._is_here():
            if isinstance(value, str):
                return ast.Constant(f"{value}x")
            return ast.Constant(not value if isinstance(value, bool) else value + 1)
        return node

    def _arithmetic(self, node: Any) -> Any:
        other = _ARITHMETIC.get(type(node.op))
        if other is not None and self._is_here():
            node.op = other()
        return self._inner(node)

    def _inner(self, node: Any) -> Any:
        return self.generic_visit(node)


def main() -> None:
    with open("main.py", encoding="utf-8") as file:
        source = file.read()
    counter = _Mutator(-1)
    original = ast.unparse(counter.visit(ast.parse(source)))
    count = min(int(sys.argv[1]), counter.places)
    mutants = []
    for number in range(count):
        place = (2 * number + 1) * counter.places // (2 * count)
        tree = _Mutator(place).visit(ast.parse(source))
        mutants.append(ast.unparse(ast.fix_missing_locations(tree)))
    print(json.dumps([original, *mutants]))


if __name__ == "__main__":
    main()
