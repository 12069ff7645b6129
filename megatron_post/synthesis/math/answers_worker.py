"""Compares answers with `math-verify`, in a process of its own: `MathAnswers` starts it and may kill it.

Each line of standard input is the JSON of [wanted, given], and each line of output one of `KINDS`. sympy can
need any time and memory for what a model wrote. Python's own handlers of signals cannot interrupt it, so the
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
# LaTeX alone: math-verify evaluates other expressions as Python
_LATEX = (LatexExtractionConfig(boxed_match_priority=0),)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
# math-verify reads a word as a product of its letters, so that "listen" would equal "silent"
_LETTERS = re.compile(r"[A-Za-z][A-Za-z ,.'-]*")
_WORD = re.compile(r"[A-Za-z]{3}|^no$", re.IGNORECASE)
_BLANK = r"(?:\\[,;:! ]|~|\s)"
# "1 000" and "1\,000" would be the product 1 * 000, and "1 1/2" the fraction (1 + 1)/2
_THOUSANDS = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{_BLANK}+\d{{3}})+(?![\d.]*\d)")
_MIXED = re.compile(rf"(?<![\d.])(\d+){_BLANK}+(\d+)/(\d+)")
_NEIGHBOURS = re.compile(rf"(?<![\d.^_])(?<!frac )\d[\d.]*{_BLANK}+\d")
# a text behind a number, where the answer or a part of a list ends
_UNIT = re.compile(rf"(?<=[\d}})%]){_BLANK}*\\text\{{([^{{}}]*)\}}(\^\{{?-?\d\}}?)?(?=\s*(?:[,;]|$))")
_BARE_UNIT = re.compile(r"[-+\s]*[\d.,]+\s*([A-Za-z][A-Za-z. /]*)")
_BETWEEN = re.compile(r"\d[^\d]*?\\text\{(?!\s*(?:and|or)\s*\})[^{}]*\}.*\d", re.DOTALL)
_BASE = re.compile(r"\d_\{?(\w+)")
_SMALL, _CLOSE = 0.01, 1e-5  # math-verify rounds decimals to 6 places, which leaves nothing of small ones


def compare(wanted: str, given: str) -> str:
    """One of `KINDS`. A wanted answer that cannot be read equals nothing but the same text."""
    words = [_TEXT.sub(r"\1", text).strip() for text in (wanted, given)]
    if all(map(_LETTERS.fullmatch, words)) and (any(map(_WORD.search, words)) or words != [wanted, given]):
        first, second = (text.casefold().rstrip(".").split() for text in words)
        return "same" if first == second else "different"
    texts, units = zip(*map(_without_units, (wanted, given)), strict=True)
    if any(_NEIGHBOURS.search(text) or _BETWEEN.search(text) for text in texts):
        return "unreadable"  # several quantities, such as hours and minutes: math-verify drops some
    try:
        gold, found = (
            parse(f"\\boxed{{{text}}}", _LATEX, parsing_timeout=None, raise_on_error=True) for text in texts
        )
        if not gold or not found:
            return "unreadable"
        if not verify(gold, found, timeout_seconds=None, raise_on_error=True) or _differ(gold[0], found[0]):
            return "different"
    except Exception:  # of sympy, of the parser, or of the memory
        return "unreadable"
    bases = [_BASE.findall(text) for text in texts]
    return "unreadable" if bases[0] != bases[1] or (all(units) and units[0] != units[1]) else "same"


def _without_units(text: str) -> tuple[str, list[str]]:
    """The answer as math-verify reads it, and the units in it. It removes all from the first to the last."""
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
    """Without what tells no units apart: case, dots, blanks, the plural, and the order of factors."""
    plain = re.sub(r"[\s.{}]", "", unit.casefold())
    return "".join(sorted(plain.removesuffix("s") if len(plain) > 2 else plain))


def _differ(gold: Any, found: Any) -> bool:
    """Whether two small numbers differ that are the same after rounding."""
    if not any(isinstance(each, Expr) and each.is_number and each.has(Float) for each in (gold, found)):
        return False
    try:
        first, second = complex(gold), complex(found)
    except (TypeError, ValueError):  # a percentage, which math-verify keeps as two factors
        return False
    most = max(abs(first), abs(second))
    return most < _SMALL and abs(first - second) > _CLOSE * most


def _limit(kind: int, most: int) -> None:
    """Set a limit that may be raised again, below the one that a site has set."""
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
    output, sys.stdout = sys.stdout, sys.stderr  # whatever the library prints is no answer
    print(_READY, file=output, flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)
        print(compare(*json.loads(line)), file=output, flush=True)


if __name__ == "__main__":
    main()
