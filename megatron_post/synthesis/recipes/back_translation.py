"""Explanations of real code, and programs that a model wrote from these explanations alone."""

import contextlib
from typing import Any

from pydantic import Field

from megatron_post.config.section import Count, Positive, Section
from megatron_post.data.dialog import Message
from megatron_post.inference.request import Reply
from megatron_post.sandbox.languages import TOOLS, Language, program
from megatron_post.synthesis.code.mutants import survivors
from megatron_post.synthesis.code.programs import TITLES, fenced, program_in, text_of, whole_text
from megatron_post.synthesis.code.similarity import labels_of, similarity
from megatron_post.synthesis.code.unit_tests import Bench, bench_of
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.replies import blocks
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task

VERSION = 1
SANDBOX = True

_LONG_LINE = 20  # characters of a line of code that is too long to be written by chance
_MOST_QUOTED = 0.1  # share of the long lines that an explanation may contain


class Settings(Section):
    language: Language = Field("python", description="language of the code")
    samples: Count = Field(4, description="times that the code is written again. The closest is kept")
    least: float = Field(
        0.6, ge=0, le=1, description="least similarity of the closest program, if there are no tests"
    )
    tests: bool = Field(True, description="compare by tests if the code passes tests that a model writes")
    mutants: Count = Field(4, description="number of mutants of the code that check the tests")
    killed: float = Field(0.5, gt=0, le=1, description="share of the mutants that must fail the tests")
    seconds: Positive = Field(5.0, description="time limit of one run of a program in its tests")


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    code, language = text_of(row), task.settings.language
    names = {"language": TITLES[language], "tag": language}
    bench = bench_of(task, language, task.settings.seconds)
    if not await _compiles(task, code):
        raise Dropped("the code does not compile")
    labels = await labels_of(task, language, code)
    question = Message("user", task.prompt("explain", block=fenced(code, language), **names))
    explained = await task.ask("explain", [question])
    explanation = whole_text(explained, "the explanation")
    if _quotes(explanation, code):
        raise Dropped("the explanation quotes the code")
    tests = await _tests(task, bench, code) if task.settings.tests else ""
    request = Message("user", task.prompt("write", explanation=explanation, **names))
    seeds = range(task.settings.samples)
    replies = await task.together(*(task.ask("write", [request], seed=seed) for seed in seeds))
    close = await task.together(*(_closeness(task, bench, reply, tests, labels) for reply in replies))
    best = max(seeds, key=lambda seed: (close[seed], -seed))
    least = 0.0 if tests else task.settings.least
    if close[best] < least:
        what = "passes the tests of the code" if tests else "is close enough to the code"
        raise Dropped(
            f"nothing that was written {what}", f"similarities {[round(each, 3) for each in close]}"
        )
    compared_by = "tests" if tests else "syntax tree" if language == "python" else "tokens"
    extra = {"language": language, "similarity": round(close[best], 3), "compared_by": compared_by}
    return [
        Row([question, explained.message], "code", kind="explanation", extra=extra),
        Row([request, replies[best].message], "code", kind="program", extra=extra),
    ]


async def _compiles(task: Task[Settings], source: str) -> bool:
    """Whether a program compiles. Raises `ValueError` if the sandbox lacks the language."""
    language = task.settings.language
    outcome = await task.run("compile", *program(language, source, check=True))
    if outcome.kind == "unavailable":
        raise ValueError(
            f"the sandbox cannot compile {language}: it needs {', '.join(TOOLS[language])} there"
        )
    return outcome.ok


async def _tests(task: Task[Settings], bench: Bench, code: str) -> str:
    """Tests that the code passes and that enough of its mutants fail. Empty if there are none."""
    values = {"language": TITLES[bench.language], "code": code.rstrip(), "seconds": f"{bench.seconds:g}"}
    reply = await task.ask("tests", task.prompt("tests", **values))
    try:
        tests = program_in(reply, "python", "the file of tests")
    except Dropped:
        return ""
    if not (await bench.run("test_code", code, tests)).ok:
        return ""
    _, killed = await survivors(bench, code, tests, task.settings.mutants)
    return tests if killed >= task.settings.killed else ""


async def _closeness(
    task: Task[Settings], bench: Bench, reply: Reply, tests: str, labels: list[str]
) -> float:
    """Similarity of a reply's program to the code. It is -1 without a program, or if the tests fail."""
    with contextlib.suppress(Dropped):
        source = program_in(reply, bench.language)
        if tests and not (await bench.run("test", source, tests)).ok:
            return -1.0
        if tests or await _compiles(task, source):
            return similarity(labels, await labels_of(task, bench.language, source))
    return -1.0


def _quotes(explanation: str, code: str) -> bool:
    """Whether an explanation has a block of code, or too many lines of the code."""
    said, lines = " ".join(explanation.split()), _long_lines(code)
    quoted = sum(line in said for line in lines)
    return bool(blocks(explanation)) or quoted > max(1, _MOST_QUOTED * len(lines))


def _long_lines(code: str) -> list[str]:
    """The long lines of code, and short lines that stand together, each with single blanks."""
    found, short = [], ""
    for line in code.split("\n"):
        line = " ".join(line.split())
        short = f"{short} {line}".strip() if len(line) < _LONG_LINE else line
        if len(short) >= _LONG_LINE:
            found.append(short)
            short = ""
    return found
