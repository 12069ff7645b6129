"""Translations of programs to another language, with the same output for all inputs that were tried."""

import json
import re
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, model_validator

from megatron_post.config.section import Count, Distinct, Positive, Section
from megatron_post.data.dialog import Message
from megatron_post.sandbox.languages import Language
from megatron_post.synthesis.code.programs import TITLES, block_in, fenced, program_in, text_of
from megatron_post.synthesis.code.tokens import tokens
from megatron_post.synthesis.code.unit_tests import Bench, bench_of
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task

VERSION = 1
SANDBOX = True

_RUNNERS: dict[Language, str] = {  # commands that would run the source program as it is
    "python": r"python[\d.]*",
    "javascript": "node|nodejs",
    "cpp": r"g\+\+|c\+\+|gcc|cc",
    "java": "javac?",
    "rust": "rustc|cargo",
    "bash": "(?:ba)?sh",
}


class Settings(Section):
    source: Language = Field("python", description="language of the input programs")
    targets: Annotated[tuple[Language, ...], Distinct] = Field(
        ("rust",),
        min_length=1,
        description="languages to translate to. One is drawn at random for each program",
    )
    cases: Count = Field(10, le=24, description="number of inputs that the author writes")
    least_cases: Count = Field(4, description="least number of inputs that the source program must answer")
    seconds: Positive = Field(5.0, description="time limit of one run of a program")

    @model_validator(mode="after")
    def _differs(self) -> "Settings":
        if self.source in self.targets:
            raise ValueError(f"targets: {self.source} is the language of the source; leave it out")
        if self.least_cases > self.cases:
            raise ValueError(f"least_cases={self.least_cases} is more than cases={self.cases}")
        return self


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    settings, source = task.settings, text_of(row)
    target = task.random.choice(settings.targets)
    bench = bench_of(task, settings.source, settings.seconds)
    expected = await _expected(task, bench, source)
    titles = {"source_language": TITLES[settings.source], "language": TITLES[target]}
    request = Message("user", task.prompt("translate", block=fenced(source, settings.source), **titles))
    system = Message("system", task.prompt("system", language=TITLES[target], tag=target))
    reply = await task.ask("translate", [system, request])
    program = program_in(reply, target, "the translation")
    if _runs_source(program, target, settings.source):
        raise Dropped("the translation runs the language of the source")
    report = await replace(bench, language=target).run("translation", program, _asking(list(expected)))
    if report.kind == "build":
        raise Dropped("the translation does not compile", report.message)
    if not report.ok:
        raise Dropped(f"the translation ends as {report.kind!r}", report.text)
    for run, digest in zip(report.runs, expected.values(), strict=True):
        if run.returncode != 0 or run.digest != digest:
            printed = f"return code {run.returncode}, output {run.stdout[:200]!r}"
            raise Dropped("the outputs differ", f"input {run.stdin[:200]!r}, {printed}")
    extra = {"language": target, "source_language": settings.source, "cases": list(expected)}
    return [Row([request, reply.message], "code", kind="translation", extra=extra)]


async def _expected(task: Task[Settings], bench: Bench, source: str) -> dict[str, str]:
    """Inputs that the source program answers, with the digests of its outputs.

    The outputs are never in the sandbox when the translation runs there. Raises `Dropped` if the source
    program answers too few inputs, or gives different outputs for the same input.
    """
    count = task.settings.cases
    language = TITLES[bench.language]
    reply = await task.ask("cases", task.prompt("cases", language=language, source=source, count=count))
    cases = _cases(block_in(reply, "the list of inputs", "JSON", ("json",)))[:count]
    report = await bench.run("source", source, _asking([case for case in cases for _ in range(2)]))
    if report.kind == "build":
        raise Dropped("the source program does not compile", report.message)
    runs = report.runs[:-1] if report.kind == "hang" else report.runs
    found = {}
    for case, first, again in zip(cases, runs[::2], runs[1::2], strict=False):
        if first.digest != again.digest:
            raise Dropped("the source program answers the same input differently", repr(case)[:300])
        if first.returncode == 0 and first.printed:
            found[case] = first.digest
    if len(found) < task.settings.least_cases:
        raise Dropped(
            "the source program answers too few inputs", f"{len(found)} of {len(cases)}. {report.text}"
        )
    if len(set(found.values())) == 1:
        raise Dropped("the source program answers every input alike")
    return found


def _cases(text: str) -> list[str]:
    """The inputs in a list in JSON, without repeats. Raises `Dropped` if it is not a list of strings."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Dropped("the list of inputs is not JSON", str(error)) from None
    if not isinstance(found, list) or not all(isinstance(case, str) for case in found):
        raise Dropped("the list of inputs is not a list of texts", text[:200])
    return list(dict.fromkeys(found))


def _asking(cases: list[str]) -> str:
    """Tests that run the program on each input and assert nothing."""
    return f"def test_cases():\n    for case in {cases!r}:\n        run(case)\n"


def _runs_source(program: str, target: Language, source: Language) -> bool:
    """Whether a translation names a command of the source's language in a string, or anywhere in Bash."""
    kinds = ("string",) if target != "bash" else ("string", "word")
    command = re.compile(rf"(?<![\w.$-])(?:{_RUNNERS[source]})(?=[\"'`\s]|$)")
    return any(token.kind in kinds and command.search(token.text) for token in tokens(target, program))
