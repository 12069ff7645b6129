"""Makes mutants, which are programs with a planted error. Good tests fail on most of them."""

import difflib
import json

from megatron_post.sandbox.languages import Language
from megatron_post.synthesis.code.scripts import parse_python
from megatron_post.synthesis.code.tokens import tokens
from megatron_post.synthesis.code.unit_tests import Bench
from megatron_post.synthesis.recipe import Dropped

# Programs that do nothing. Tests that they pass assert nothing.
_EMPTY: dict[Language, str] = {
    "python": "",
    "javascript": "",
    "cpp": "int main() {}\n",
    "java": "public class Main { public static void main(String[] arguments) {} }\n",
    "rust": "fn main() {}\n",
    "bash": "",
}
_OTHERS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "===": "!==", "!==": "===",
    "+": "-", "-": "+", "*": "+", "/": "*", "%": "+", "+=": "-=", "-=": "+=", "*=": "+=",
    "&&": "||", "||": "&&", "++": "--", "--": "++",
    "true": "false", "false": "true",
    "-lt": "-le", "-le": "-lt", "-gt": "-ge", "-ge": "-gt", "-eq": "-ne", "-ne": "-eq", "-z": "-n",
}  # fmt: skip
_BETWEEN_BLANKS = "<>+-*/%"  # without blanks they may be brackets of a type, signs or pointers


async def survivors(bench: Bench, source: str, tests: str, count: int) -> tuple[list[str], float]:
    """The changes of the mutants that pass the tests, and the share of the mutants that fail them.

    The share is 0 if the program that does nothing passes. Otherwise that program is not counted, because
    tests that it fails may still assert no more than that something is printed. Mutants that do not compile
    are not counted either. count: the largest number of mutants. Raises `Dropped` if `mutants_of` does.
    """
    mutants = await mutants_of(bench, source, count)
    runs = (bench.run("mutant", mutant, tests) for mutant, _ in mutants)
    reports = await bench.task.together(*runs)
    passed = [change for (_, change), report in zip(mutants, reports, strict=True) if report.ok]
    if reports[0].ok:
        return passed, 0.0
    count = sum(report.kind != "build" for report in reports[1:])
    return passed, 1 - len(passed) / count if count else 1.0


async def mutants_of(bench: Bench, source: str, count: int) -> list[tuple[str, str]]:
    """At most `count` mutants, each with its change. The first mutant is a program that does nothing.

    In Python, the syntax tree is changed inside the sandbox. In other languages, one token is changed, and a
    mutant may not compile. Raises `Dropped` if the mutants of a Python program cannot be made.
    """
    language = bench.language
    if language == "python":
        outcome = await parse_python(bench.task, "mutate", "mutate.py", source, str(count - 1))
        if not outcome.ok:
            raise Dropped("the program has no mutants", f"{outcome.kind}: {outcome.stderr[-300:]}")
        original, *changed = json.loads(outcome.stdout)
    else:
        original, changed = source, _by_tokens(language, source, count - 1)
    empty = (_EMPTY[language], "a program that does nothing")
    return [empty, *((mutant, _difference(original, mutant)) for mutant in changed)]


def _by_tokens(language: Language, source: str, count: int) -> list[str]:
    """Mutants with one changed token each. The changes are spread evenly over the program."""
    found = []
    for token in tokens(language, source):
        end = token.start + len(token.text)
        around = source[token.start - 1 : token.start] + source[end : end + 1]
        if token.kind == "number" and len(token.text) < 18:
            found.append((token.start, end, str(int(token.text) + 1)))
        elif token.kind == "string" and len(token.text) > 2 and token.text[0] == token.text[-1] == '"':
            found.append((token.start, end, f'"x{token.text[1:]}'))
        elif token.text in _OTHERS and (token.text not in _BETWEEN_BLANKS or around.isspace()):
            found.append((token.start, end, _OTHERS[token.text]))
    count = min(count, len(found))
    places = [found[(2 * number + 1) * len(found) // (2 * count)] for number in range(count)]
    return [source[:start] + text + source[end:] for start, end, text in places]


def _difference(original: str, mutant: str) -> str:
    lines = difflib.unified_diff(original.splitlines(), mutant.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))[:500]
