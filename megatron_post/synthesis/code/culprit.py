"""Whether the tests of a program are to blame for what they report, or the program is."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from megatron_post.synthesis.code.mutants import survivors
from megatron_post.synthesis.code.unit_tests import Bench, Report


@dataclass(frozen=True)
class Trial:
    """What tests are tried on, beside the program that they are for.

    witnesses: gives other programs for the same problem, which know nothing of this one. mutants: of the
    program, at most. killed: share of them that must fail the tests.
    """

    bench: Bench
    witnesses: Callable[[], Awaitable[list[str]]]
    mutants: int
    killed: float

    async def fault_of(self, source: str, tests: str, report: Report) -> tuple[str, str] | None:
        """If the tests are to blame: a reason that repeats, and what is wrong with them. It is counted.

        report: of these tests on this program. Tests are wrong if they cannot be loaded, if they let too many
        mutants pass, and if every program fails them that was written independently of this one.
        """
        fault = await self._fault_of(source, tests, report)
        if fault is not None:
            self.bench.task.count("blame", fault[0])
        elif not report.ok:
            self.bench.task.count("blame", "the program is wrong")
        return fault

    async def _fault_of(self, source: str, tests: str, report: Report) -> tuple[str, str] | None:
        if report.kind == "tests":
            return "the tests cannot be loaded", report.text
        if report.ok:
            passed, run = await survivors(self.bench, source, tests, self.mutants)
            if run - len(passed) >= self.killed * run:
                return None
            return "wrong programs pass the tests", "\n\n".join(
                ["Programs with an error pass them:", *passed]
            )
        others = [other for other in await self.witnesses() if other != source]
        runs = (self.bench.run("witness", other, tests) for other in others)
        reports = [each for each in await self.bench.task.together(*runs) if each.kind != "build"]
        if not reports or any(each.ok for each in reports):
            return None
        return "every program fails the tests", f"{len(reports) + 1} programs fail them. {report.text}"
