"""Compares answers with `math-verify` in a separate process, which `MathAnswers` starts and may kill.

Each line of standard input is the JSON of [wanted, given]. Each line of output is one of `KINDS`. sympy can
need any time and memory for an answer of a model, and Python's signal handlers cannot interrupt it. So the
kernel ends the process at its limits. The argument is the limit of processor time for a comparison, in
seconds.
"""

import json
import re
import resource
import sys
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Expr, Float

KINDS = ("same", "different", "unreadable")
_MEMORY = 2 * 2**30
_READY = "ready"
# Only LaTeX is parsed, because math-verify evaluates other expressions as Python.
_LATEX = (LatexExtractionConfig(boxed_match_priority=0),)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
# Words are compared here, because math-verify reads a word as a product of its letters. Then "listen" would
# equal "silent".
_LETTERS = re.compile(r"[A-Za-z][A-Za-z ,.'-]*")
_WORD = re.compile(r"[A-Za-z]{3}|^no$", re.IGNORECASE)
_BLANK = r"(?:\\[,;:! ]|~|\s)"
# Otherwise "1 000" and "1\,000" would be the product 1 * 000, and "1 1/2" would be the fraction (1 + 1)/2.
_THOUSANDS = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{_BLANK}+\d{{3}})+(?![\d.]*\d)")
_MIXED = re.compile(rf"(?<![\d.])(\d+){_BLANK}+(\d+)/(\d+)")
_NEIGHBOURS = re.compile(rf"(?<![\d.^_])(?<!frac )\d[\d.]*{_BLANK}+\d")
# A text after a number, at the end of the answer or of an item of a list.
_UNIT = re.compile(rf"(?<=[\d}})%]){_BLANK}*\\text\{{([^{{}}]*)\}}(\^\{{?-?\d\}}?)?(?=\s*(?:[,;]|$))")
_BARE_UNIT = re.compile(r"[-+\s]*[\d.,]+\s*([A-Za-z][A-Za-z. /]*)")
_BETWEEN = re.compile(r"\d[^\d]*?\\text\{(?!\s*(?:and|or)\s*\})[^{}]*\}.*\d", re.DOTALL)
_BASE = re.compile(r"\d_\{?(\w+)")
# math-verify rounds decimals to 6 places, which is too coarse for small numbers. These are compared here.
_SMALL, _CLOSE = 0.01, 1e-5


def compare(wanted: str, given: str) -> str:
    """Compare two answers. Returns one of `KINDS`."""
    words = [_TEXT.sub(r"\1", text).strip() for text in (wanted, given)]
    if all(map(_LETTERS.fullmatch, words)) and (any(map(_WORD.search, words)) or words != [wanted, given]):
        first, second = (text.casefold().rstrip(".").split() for text in words)
        return "same" if first == second else "different"
    texts, units = zip(*map(_without_units, (wanted, given)), strict=True)
    if any(_NEIGHBOURS.search(text) or _BETWEEN.search(text) for text in texts):
        return "unreadable"  # math-verify drops some of several quantities, such as hours and minutes
    try:
        gold, found = (
            parse(f"\\boxed{{{text}}}", _LATEX, parsing_timeout=None, raise_on_error=True) for text in texts
        )
        if not gold or not found:
            return "unreadable"
        if not verify(gold, found, timeout_seconds=None, raise_on_error=True) or _differ(gold[0], found[0]):
            return "different"
    except Exception:  # raised by sympy or the parser, or at the memory limit
        return "unreadable"
    bases = [_BASE.findall(text) for text in texts]
    return "unreadable" if bases[0] != bases[1] or (all(units) and units[0] != units[1]) else "same"


def _without_units(text: str) -> tuple[str, list[str]]:
    """The answer without its units, and the units. math-verify would also remove the text between them."""
    text = _TEXT.sub(r"\\text{\1}", text).strip().rstrip(".")
    for sign, meant in (("°", "^\\circ"), ("€", ""), ("£", "")):
        text = text.replace(sign, meant)
    text = _THOUSANDS.sub(lambda match: re.sub(r"[^\d]", "", match[0]), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    units = [word + power for word, power in _UNIT.findall(text)]
    if bare := _BARE_UNIT.fullmatch(text):
        units.append(bare[1])
    return _UNIT.sub("", text).strip(), sorted({_plain_unit(unit) for unit in units} - {""})


def _plain_unit(unit: str) -> str:
    """A unit in a normal form, which ignores case, dots, blanks, the plural and the order of factors."""
    plain = re.sub(r"[\s.{}]", "", unit.casefold())
    return "".join(sorted(plain.removesuffix("s") if len(plain) > 2 else plain))


def _differ(gold: Any, found: Any) -> bool:
    """Whether two small numbers differ although math-verify rounds them to the same number."""
    if not any(isinstance(each, Expr) and each.is_number and each.has(Float) for each in (gold, found)):
        return False
    try:
        first, second = complex(gold), complex(found)
    except (TypeError, ValueError):  # a percentage, which math-verify keeps as two factors
        return False
    most = max(abs(first), abs(second))
    return most < _SMALL and abs(first - second) > _CLOSE * most


def _limit(kind: int, most: int) -> None:
    """Set a soft limit, which may be raised again, within the hard limit of the site."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    seconds = int(sys.argv[1])
    for kind, most in (
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _limit(kind, most)
    output, sys.stdout = sys.stdout, sys.stderr  # so that the library's own output is not read as an answer
    print(_READY, file=output, flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)
        print(compare(*json.loads(line)), file=output, flush=True)


if __name__ == "__main__":
    main()
