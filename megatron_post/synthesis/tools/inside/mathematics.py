"""Runs in the sandbox, and imports nothing of the package: the answers to mathematical queries, by sympy.

The arguments are the names of files, each of which has a query. The output is a JSON list with two answers to
each query, in the form of Wolfram Alpha's in Meta's examples, or null where the computation ended without
one. The two are equal unless an answer cannot be reproduced. Each is computed in a process of its own, which
knows nothing of the others. These are forked, because sympy takes longer to import than most queries do.
"""

import json
import os
import random
import re
import sys
from typing import Any

import sympy
import sympy.core.random
from sympy.core.alphabets import greeks
from sympy.core.function import AppliedUndef
from sympy.parsing import sympy_parser

_READING = (
    *sympy_parser.standard_transformations,
    sympy_parser.convert_xor,
    sympy_parser.implicit_multiplication,
    sympy_parser.convert_equals_signs,
)
_SYMBOL = re.compile(rf"(?:[A-Za-z]|{'|'.join(greeks)})_?\d*")
_UNSOLVED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
_DIGITS = 15


def parts(value: Any) -> list[sympy.Basic]:
    """The expressions in a result, which may be a list, a set or a mapping of some.

    Raises `ValueError` for anything else, such as a function or a text.
    """
    if isinstance(value, dict):
        return [part for pair in value.items() for each in pair for part in parts(each)]
    if isinstance(value, list | tuple | set | frozenset):
        return [part for each in value for part in parts(each)]
    if isinstance(value, sympy.MatrixBase):
        return parts(value.flat())
    if isinstance(value, bool | int | float | complex):
        return []
    if not isinstance(value, sympy.Basic):
        raise ValueError("it is not an expression")
    return [value]


def check_names(value: Any) -> None:
    """Raises `ValueError` for words that sympy takes for symbols, such as those of a question in English."""
    for part in parts(value):
        unknown = sorted(str(each.func) for each in part.atoms(AppliedUndef))
        unknown += sorted(each.name for each in part.atoms(sympy.Symbol) if not _SYMBOL.fullmatch(each.name))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not known")


def answer(query: str) -> Any:
    """The value of an expression, or the solutions of an equation.

    Raises `ValueError`, and what sympy raises.
    """
    value = sympy_parser.parse_expr(query, {"e": sympy.E}, transformations=_READING)
    check_names(value)
    if isinstance(value, sympy.Basic) and value.has(*_UNSOLVED):
        value = value.doit()  # such as Sum(1/n^2, (n, 1, oo))
    if isinstance(value, sympy.Equality):
        unknown = sorted(value.free_symbols, key=str)
        value = sympy.solve(value, unknown[0]) if len(unknown) == 1 else sympy.solve(value, dict=True)
    if any(part.has(*_UNSOLVED) for part in parts(value)):
        raise ValueError("there is no closed form")
    return value


def pods_of(query: str, value: Any) -> list[dict[str, Any]]:
    texts = {"Input interpretation": query, "Result": str(value)}
    is_number = isinstance(value, sympy.Expr) and value.is_number
    if is_number and not value.is_Integer and not value.is_Float:
        texts["Decimal approximation"] = str(sympy.N(value, _DIGITS))
    return [
        {
            "title": title,
            **({"primary": True} if title == "Result" else {}),
            "subpods": [{"title": "", "plaintext": text}],
        }
        for title, text in texts.items()
    ]


def result_of(query: str) -> dict[str, Any]:
    found: dict[str, Any] = {"success": True, "inputstring": query}
    try:
        found["pods"] = pods_of(query, answer(query))
    except Exception as error:  # whatever a query of a model leads to
        reason = str(error).partition("\n")[0]
        found |= {"success": False, "error": f"{type(error).__name__}: {reason}"}
    return {"queryresult": found}


def computed(query: str) -> Any:
    """The result of a query, computed in a process that is forked, or None if it ends without one."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1), os.dup2(nowhere, 2)  # what a query prints is no output
            with open(writing, "w") as file:
                json.dump(result_of(query), file)
            os._exit(0)
        finally:
            os._exit(1)  # a query may raise what ends the interpreter
    os.close(writing)
    with open(reading) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if status == 0 else None


def main() -> None:
    random.seed(0), sympy.core.random.seed(0)  # the forked processes would draw the same numbers without it
    found = []
    for name in sys.argv[1:]:
        with open(name, encoding="utf-8", errors="surrogatepass") as file:
            query = file.read()
        found.append([computed(query), computed(query)])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
