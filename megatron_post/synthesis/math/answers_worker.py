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

from math_verify import LatexExtractionConfig, parse, verify

KINDS = ("same", "different", "unreadable")
_MEMORY = 2 * 2**30
_READY = "ready"
# LaTeX alone: math-verify evaluates other expressions as Python
_LATEX = (LatexExtractionConfig(boxed_match_priority=0),)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
# math-verify reads a word as a product of its letters, so that "listen" would equal "silent"
_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z ,.'-]*")


def compare(wanted: str, given: str) -> str:
    """One of `KINDS`. A wanted answer that cannot be read equals nothing but the same text."""
    words = [_TEXT.sub(r"\1", text).strip() for text in (wanted, given)]
    if all(_WORDS.fullmatch(text) for text in words):
        first, second = (text.casefold().rstrip(".").split() for text in words)
        return "same" if first == second else "different"
    try:
        gold, found = (
            parse(f"\\boxed{{{text}}}", _LATEX, parsing_timeout=None, raise_on_error=True)
            for text in (wanted, given)
        )
        if not gold or not found:
            return "unreadable"
        return "same" if verify(gold, found, timeout_seconds=None, raise_on_error=True) else "different"
    except Exception:  # of sympy, of the parser, or of the memory
        return "unreadable"


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
