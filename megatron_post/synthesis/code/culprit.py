"""Decides whether a report of tests shows an error in the program or in the tests."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from megatron_post.synthesis.code.mutants import survivors
from megatron_post.synthesis.code.unit_tests import Bench, Report


@dataclass(frozen=True)
class Trial:
    """Checks tests with mutants of the program and with other programs for the same problem.

    witnesses: returns programs for the same problem that were written independently. mutants: the largest
    number of mutants. killed: share of the mutants that must fail the tests.
    """

    bench: Bench
    witnesses: Callable[[], Awaitable[list[str]]]
    mutants: int
    killed: float

    async def fault_of(self, source: str, tests: str, report: Report) -> tuple[str, str] | None:
        """The fault of the tests, as a reason for the report and a detail, or None. It is counted.

        report: the report of these tests on this program. Tests are wrong if they cannot be loaded, if too
        many mutants pass them, or if this program and all independent programs fail them.
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
            passed, killed = await survivors(self.bench, source, tests, self.mutants)
            if killed >= self.killed:
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
