"""Runs unit tests that a model wrote on a program that a model wrote, and reads their report.

Tests are a Python file for a program in any language. They call `run(stdin, *arguments)`, which runs the
program in a separate process. So a program cannot pass by manipulating its tests.
"""

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_post.sandbox.languages import TOOLS, Language, steps
from megatron_post.sandbox.outcome import Outcome
from megatron_post.synthesis.code.scripts import script
from megatron_post.synthesis.programs import Files
from megatron_post.synthesis.task import Task

MOST_CHARACTERS = 32_768  # of a program or of tests

# With -P and -s Python does not search the directory that the program can write to, or its home, for modules.
_COMMAND = ("python3", "-P", "-s", "run_tests.py")
_SHORT = 1000  # characters of the tests' own output, which are kept if there is no report


class Run(BaseModel):
    """One run of a program by its tests. Texts are shortened.

    digest: hash of the whole standard output without blanks at the ends of lines.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stdin: str
    arguments: str
    stdout: str
    stderr: str
    returncode: int
    printed: bool
    digest: str


class Report(BaseModel):
    """The result of tests on a program.

    kind: "passed", "failed", "hang" (a run took too long), "build" (the program does not compile or parse) or
    "tests" (the tests cannot be loaded, or there are none). If the tests wrote no report, it is the kind of
    the outcome. runs: the runs of the test that failed, or of the last test. tests: the number of tests, if
    all have passed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    message: str = ""
    test: str = ""
    runs: tuple[Run, ...] = ()
    tests: int = 0

    @property
    def ok(self) -> bool:
        return self.kind == "passed"

    @property
    def text(self) -> str:
        """What a model needs to know of a failure."""
        parts = [f"Test {self.test} fails.\n" if self.test else "", self.message]
        for run in self.runs[-3:]:
            arguments = f" with the arguments {run.arguments!r}" if run.arguments else ""
            parts.append(f"\n\nA run of the program{arguments} ended with return code {run.returncode}.")
            streams = {"stdin": run.stdin, "stdout": run.stdout, "stderr": run.stderr}
            parts += [f"\n{name}:\n{text}" for name, text in streams.items() if text]
        return "".join(parts).strip()


@dataclass(frozen=True)
class Bench:
    """Runs tests on programs in one language, for one input row.

    nonce: a text that neither a program nor its author can know. seconds: time limit of one run of a program.
    """

    task: Task[Any]
    language: Language
    nonce: str
    seconds: float

    async def run(self, step: str, source: str, tests: str) -> Report:
        """Build the program and run the tests on it, up to the first test that fails.

        Raises `ValueError` if a tool of the language is missing in the sandbox.
        """
        file, build, run = steps(self.language, source)
        job = {"nonce": self.nonce, "build": build, "run": run, "seconds": self.seconds}
        files: Files = {
            "run_tests.py": script("run_tests.py"),
            "job.json": json.dumps(job),
            "tests.py": tests,
            f"program/{file}": source,
        }
        report = _report(await self.task.run(step, files, _COMMAND), self.nonce)
        if report.kind == "unavailable":
            raise ValueError(
                f"the sandbox cannot run {self.language}: it needs {', '.join(TOOLS[self.language])} there. "
                f"Install them, or leave the language out. {report.message}"
            )
        return report


def bench_of(task: Task[Any], language: Language, seconds: float) -> Bench:
    """A bench whose nonce follows from the input row, so that a replay runs the same programs."""
    return Bench(task, language, f"{task.random.getrandbits(128):032x}", seconds)


def _report(outcome: Outcome, nonce: str) -> Report:
    """The report in the only line with the nonce.

    Several such lines are not a report, because the tests may have forged one of them.
    """
    lines = [line for line in outcome.stdout.split("\n") if line.startswith(f"{nonce} ")]
    if len(lines) == 1 and outcome.kind in ("passed", "failed"):
        with contextlib.suppress(ValidationError):
            return Report.model_validate_json(lines[0].removeprefix(f"{nonce} "))
    kind = "no report" if outcome.kind in ("passed", "failed") else outcome.kind
    message = f"The tests did not come to their end. They ended as {kind!r}."
    return Report(kind=kind, message=f"{message}\n{outcome.stderr[-_SHORT:]}".strip())
