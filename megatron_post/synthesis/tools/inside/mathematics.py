"""Runs in the sandbox, and imports nothing of the package: the answer to a mathematical query, by sympy.

The query is in the file query.txt. The output is JSON in the form of Wolfram Alpha's answers in Meta's
examples.
"""

import json
import re
import sys
from typing import Any

import sympy
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
    """The expressions in a result, which may be a list, a set or a mapping."""
    if isinstance(value, dict):
        return [part for pair in value.items() for each in pair for part in parts(each)]
    if isinstance(value, list | tuple | set | frozenset):
        return [part for each in value for part in parts(each)]
    return [value] if isinstance(value, sympy.Basic) else []


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
    if callable(value) and not isinstance(value, sympy.Basic):
        raise ValueError("it is not an expression")
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


def main() -> None:
    with open("query.txt", encoding="utf-8", errors="surrogatepass") as file:
        query = file.read()
    found: dict[str, Any] = {"success": True, "inputstring": query}
    try:
        found["pods"] = pods_of(query, answer(query))
    except Exception as error:  # whatever a query of a model leads to
        reason = str(error).partition("\n")[0]
        found |= {"success": False, "error": f"{type(error).__name__}: {reason}"}
    json.dump({"queryresult": found}, sys.stdout, indent=4, ensure_ascii=False)


if __name__ == "__main__":
    main()
