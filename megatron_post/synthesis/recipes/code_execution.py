"""Problems from real code with programs that pass tests, some of them after a correction."""

import contextlib
import re
from typing import Annotated, Any

from pydantic import Field

from megatron_post.config.section import Count, Distinct, Positive, Section
from megatron_post.data.dialog import Message
from megatron_post.inference.request import Reply
from megatron_post.sandbox.languages import Language
from megatron_post.synthesis.code.culprit import Trial
from megatron_post.synthesis.code.lint import lint
from megatron_post.synthesis.code.programs import TITLES, program_in, text_of, whole_text
from megatron_post.synthesis.code.unit_tests import Bench, Report, bench_of
from megatron_post.synthesis.recipe import Dropped
from megatron_post.synthesis.row import Row
from megatron_post.synthesis.task import Task

VERSION = 1
MODELS = ("author", "judge")
SANDBOX = True

_PROBLEM = re.compile(
    r"\**Topic:\**[ \t]*(?P<topic>[^\n]+)\n\s*\**Problem:\**\s*(?P<problem>.*\S)\s*", re.DOTALL
)
_VERDICT = re.compile(r"Bugs:\** *(yes|no)\s*\n\**Intent:\** *(yes|no)\s*\Z", re.IGNORECASE)
_LAST = {  # the reason for dropping the row, by the kind of the last program's report
    "build": "the last program does not compile",
    "lint": "the linter finds faults in the last program",
    "failed": "the last program fails its tests",
    "hang": "the last program does not end in time",
}


class Settings(Section):
    languages: Annotated[tuple[Language, ...], Distinct] = Field(
        ("python",),
        min_length=1,
        description="languages of the programs. One is drawn at random for each snippet",
    )
    tries: Count = Field(3, description="programs that the author may write for a problem, with the first")
    test_tries: Count = Field(
        2, description="files of tests that may be written for a problem, and for a correction"
    )
    witnesses: Count = Field(
        2, description="other programs for a problem, which show whether the tests cause a failure"
    )
    mutants: Count = Field(4, description="number of mutants of a program that check its tests")
    killed: float = Field(0.5, gt=0, le=1, description="share of the mutants that must fail the tests")
    seconds: Positive = Field(5.0, description="time limit of one run of a program in its tests")
    judge: bool = Field(False, description="also ask the model `judge` about bugs and readability")


async def recipe(row: dict[str, Any], task: Task[Settings]) -> list[Row]:
    language = task.random.choice(task.settings.languages)
    asked = task.prompt("problem", snippet=text_of(row), language=TITLES[language])
    found = _PROBLEM.fullmatch(whole_text(await task.ask("problem", asked), "the problem"))
    if found is None:
        raise Dropped("the problem is not in the form that was asked for")
    work = _Work(task, bench_of(task, language, task.settings.seconds), found["problem"])
    await work.write_tests()
    dialog = [work.request]
    for attempt in range(task.settings.tries):
        reply = await work.ask("correct" if attempt else "solve", dialog)
        dialog.append(reply.message)
        program = program_in(reply, language)
        fault = await work.fault_of(program)
        if fault is None:
            if work.are_tests_shown:
                await work.check_unseen(program)
            await _judge(task, found["problem"], reply)
            kind = "correction" if attempt else "first_try"
            extra = {"language": language, "topic": found["topic"].strip(), "tests": work.tests}
            return [Row(dialog, "code", kind=kind, extra=extra)]
        dialog.append(work.feedback(fault))
    assert fault is not None
    raise Dropped(_LAST.get(fault.kind, f"the last program ends as {fault.kind!r}"), fault.text[-1000:])


class _Work:
    """One problem with its tests, and the programs that check the tests."""

    def __init__(self, task: Task[Settings], bench: Bench, problem: str) -> None:
        self.task, self.bench, self.problem = task, bench, problem
        self.tests, self._test_tries = "", 0
        self.are_tests_shown = False
        self._programs: list[str] | None = None
        self._trial = Trial(bench, self._witnesses, task.settings.mutants, task.settings.killed)
        title = TITLES[bench.language]
        self._system = Message("system", task.prompt("system", language=title, tag=bench.language))
        self.request = Message("user", task.prompt("solve", problem=problem, language=title))

    async def ask(self, step: str, dialog: list[Message], seed: int = 0) -> Reply:
        """Ask the author. The system prompt sets the style of the program and is not a part of the row."""
        return await self.task.ask(step, [self._system, *dialog], seed=seed)

    async def write_tests(self, reason: str = "", fault: str = "") -> None:
        """Have the tests written. Raises `Dropped` with the reason after too many attempts."""
        if self._test_tries == self.task.settings.test_tries:
            raise Dropped(reason, fault)
        self._test_tries += 1
        self.tests = await self._ask_for_tests(tests=self.tests, fault=fault)

    async def _ask_for_tests(self, *, tests: str = "", fault: str = "", seed: int = 0) -> str:
        values = {
            "problem": self.problem,
            "seconds": f"{self.bench.seconds:g}",
            "tests": tests,
            "fault": fault,
        }
        reply = await self.task.ask("tests", self.task.prompt("tests", **values), seed=seed)
        return program_in(reply, "python", "the file of tests")

    def feedback(self, fault: Report) -> Message:
        """The message that asks the author to correct a program."""
        self.are_tests_shown |= fault.kind not in ("build", "lint")
        return Message("user", self.task.prompt("correct", fault=fault, tests=self.tests))

    async def fault_of(self, source: str) -> Report | None:
        """Why the program must be corrected, or None. If the tests are wrong, they are written again first.

        Raises `Dropped` if the tests stay wrong.
        """
        if self.bench.language == "python" and (found := await lint(self.task, source)) is not None:
            return found
        while True:
            report = await self.bench.run("test", source, self.tests)
            if report.kind == "build":
                return report
            if (wrong := await self._trial.fault_of(source, self.tests, report)) is None:
                return None if report.ok else report
            await self.write_tests(*wrong)

    async def check_unseen(self, source: str) -> None:
        """Run tests that the author has not seen, because the program may contain the answers of the others.

        Raises `Dropped` if it fails them, or if no such tests can be written.
        """
        for seed in range(1, self.task.settings.test_tries + 1):
            tests = await self._ask_for_tests(seed=seed)
            report = await self.bench.run("unseen", source, tests)
            if await self._trial.fault_of(source, tests, report) is None:
                if report.ok:
                    return
                raise Dropped("the correction passes only the tests that it has seen", report.text)
        raise Dropped("there are no good tests that the correction has not seen")

    async def _witnesses(self) -> list[str]:
        """Other programs for the same problem. They are requested when they are first needed."""
        if self._programs is None:
            seeds = range(1, self.task.settings.witnesses + 1)
            replies = await self.task.together(*(self.ask("solve", [self.request], seed) for seed in seeds))
            self._programs = []
            for reply in replies:
                with contextlib.suppress(Dropped):
                    self._programs.append(program_in(reply, self.bench.language))
        return self._programs


async def _judge(task: Task[Settings], problem: str, reply: Reply) -> None:
    """Raises `Dropped` if the judge is asked and finds a fault."""
    if not task.settings.judge:
        return
    asked = task.prompt("judge", problem=problem, answer=reply.text)
    text = whole_text(await task.ask("judge", asked, model="judge"), "the verdict")
    verdict = _VERDICT.search(text)
    if verdict is None:
        raise Dropped("the verdict is not in the form that was asked for")
    task.count("judge", f"bugs: {verdict[1].lower()}, intent: {verdict[2].lower()}")
    if verdict[1].lower() == "yes" or verdict[2].lower() == "no":
        raise Dropped("the judge finds a fault", text[-500:])
