"""`megatron-post synthesize run` runs a recipe on every input row and writes the results in order.

A process works on the input rows rank, rank + size, and so on, many of them at a time. Replies and outcomes
of programs come from the journal if it has them. So a run that is restarted sends only new requests, and it
writes the same bytes as a run that was not interrupted.

A recipe with `generations` has several sets of input rows, one after the other. The next set depends on what
all processes have found, so each process waits for the others before it.
"""

import asyncio
import contextlib
import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_post.config.section import Section
from megatron_post.data.rows import BadRows
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.files import write_lines
from megatron_post.storage.lock import turn_in
from megatron_post.synthesis.attempt import attempt
from megatron_post.synthesis.generations import GenerationRows
from megatron_post.synthesis.inputs import InputRow, read_input
from megatron_post.synthesis.parts import PARTS, Part, Result, is_part_of, part_path, results_of
from megatron_post.synthesis.progress import RowProgress
from megatron_post.synthesis.recipe import Prepared, Recipe, load_recipe
from megatron_post.synthesis.record import record_of, summary_of, update_record
from megatron_post.synthesis.report import write_report
from megatron_post.synthesis.resources import Resources, open_resources
from megatron_post.synthesis.row import is_preference
from megatron_post.synthesis.settings import Synthesis, recipe_settings
from megatron_post.synthesis.summary import Summary, read_summary, write_summary

_SHOWN = 10  # failures in a message
_SECONDS_BETWEEN_LOOKS = 0.25  # for the parts of other processes
_ROWS, _PREFERENCES = "rows.jsonl", "preferences.jsonl"


class TooManyFailures(ValueError):
    """More input rows failed than `max_failed` allows."""


@dataclass
class _Run:
    """One process of a run."""

    settings: Synthesis
    recipe: Recipe
    own: Section
    prepared: Prepared | None
    record: dict[str, Any]
    fingerprint: str
    rank: int
    size: int
    num_rows: int  # input rows; those that are known so far, if there are generations
    num_generations: int = 1  # that have begun
    failures: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return Path(self.settings.output)

    @property
    def parts(self) -> list[Path]:
        """Of all generations that have begun."""
        numbers = range(1, self.num_generations + 1)
        return [part for number in numbers for part in self.parts_of(number)]

    def parts_of(self, generation: int) -> list[Path]:
        return [part_path(self.output / PARTS, rank, self.size, generation) for rank in range(self.size)]

    def missing(self, generation: int) -> list[Path]:
        return [part for part in self.parts_of(generation) if not is_part_of(part, self.fingerprint)]

    @property
    def who(self) -> str:
        return f"process {self.rank} of {self.size}: " if self.size > 1 else ""


def synthesize(settings: Synthesis, *, rank: int = 0, size: int = 1, console: Console) -> None:
    """Run process `rank` of `size`. The process that finds all parts finished writes the rows and the report.

    A request that was answered is sent again only if a change affects it. Raises `ValueError` for wrong
    settings, an input that cannot be read, a server that does not work, a full disk and too many failures
    (`TooManyFailures`). The journal keeps all answers in any case.
    """
    recipe = load_recipe(settings.recipe)
    own = recipe_settings(settings, recipe)
    prepared = recipe.prepare(own) if recipe.prepare else None
    record = record_of(settings, recipe, prepared)
    rows = record["input"]["rows"]
    run = _Run(settings, recipe, own, prepared, record, sha256_of_json(record), rank, size, rows)
    run.output.mkdir(parents=True, exist_ok=True)
    with turn_in(run.output):
        changes = update_record(run.output / "run.json", record)
    if changes:
        lines = [f"{run.who}settings that changed since the last start:", *(f"  {line}" for line in changes)]
        _print(console, "\n".join(lines))
    if summary := _finished(run):
        _print(console, f"{run.output} is finished: {summary.in_words}. Nothing was asked")
        return
    if recipe.generations is not None:
        asyncio.run(_make_generations(run, console))
    elif run.parts[rank] in run.missing(1):
        asyncio.run(_make_only_part(run, console))
    missing = run.missing(run.num_generations)
    if missing and not _finished(run):
        _print(console, f"{run.who}its part is finished, and {len(missing)} of {size} are not")
        return
    with turn_in(run.output):
        summary = _finished(run) or _put_together(run)
        shutil.rmtree(run.output / PARTS, ignore_errors=True)
    _print(console, f"{run.output}: {summary.in_words}. {run.output / 'report.html'} has the reasons")


def _finished(run: _Run) -> Summary | None:
    """The summary if the rows of this run have been written, otherwise None."""
    found = read_summary(run.output, run.fingerprint)
    files = [_ROWS, *([_PREFERENCES] if found and found.preferences else [])]
    return found if all((run.output / file).exists() for file in files) else None


async def _make_only_part(run: _Run, console: Console) -> None:
    async with open_resources(run.settings, run.recipe, run.prepared, writer=run.rank) as resources:
        total = len(range(run.rank, run.num_rows, run.size))
        rows = (pair for pair in _input_rows(run) if pair[0] % run.size == run.rank)
        await _make_part(run, resources, rows, total, console)


async def _make_generations(run: _Run, console: Console) -> None:
    """Make this process's part of each generation. Returns when all parts of the last one are there, or when
    another process has finished the run."""
    generations = GenerationRows(run.recipe, run.own, [row.values for _, row in _input_rows(run)])
    async with open_resources(run.settings, run.recipe, run.prepared, writer=run.rank) as resources:
        while rows := generations.rows:
            run.num_generations, run.num_rows = generations.number, rows[-1][0] + 1
            if run.parts_of(generations.number)[run.rank] in run.missing(generations.number):
                own_rows = [pair for pair in rows if pair[0] % run.size == run.rank]
                await _make_part(run, resources, iter(own_rows), len(own_rows), console)
            await _wait_for_others(run, console)
            with turn_in(run.output):  # so that no process removes the parts while they are read
                if _finished(run):
                    return
                results = results_of(run.parts_of(generations.number))
                found = [values for result in results for values in result.found]
            generations.advance(found)


async def _wait_for_others(run: _Run, console: Console) -> None:
    """Wait until each process has made its part of the generation, or until the run is finished."""
    said: set[Path] = set()
    while (missing := {*run.missing(run.num_generations)}) and not _finished(run):
        if missing != said:
            others = f"waits for {len(missing)} of {run.size} processes"
            _print(console, f"{run.who}generation {run.num_generations}: {others}")
        said = missing
        await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)


async def _make_part(
    run: _Run, resources: Resources, rows: Iterator[tuple[int, InputRow]], total: int, console: Console
) -> None:
    """Make this process's part of the newest generation. rows: `total` pairs of number and row."""
    generation = run.num_generations
    who = run.who if run.recipe.generations is None else f"{run.who}generation {generation}: "
    progress = RowProgress(console, who=who, total=total, spent=resources.spent)
    part = Part(run.parts_of(generation)[run.rank], fingerprint=run.fingerprint)

    async def work() -> None:
        for number, row in rows:
            result = await attempt(run.recipe, run.settings, run.own, resources, number, row)
            part.add(result)
            progress.add(is_dropped=result.dropped is not None)
            _count_failure(run, result)
            await asyncio.sleep(0)  # a replay never waits, so it must let other tasks run

    with contextlib.closing(part):
        async with progress.shown():
            await _all(work() for _ in range(min(run.settings.rows_in_flight, total)))
        part.finish()


async def _all(works: Iterator[Any]) -> None:
    """Wait for all. The first error cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _input_rows(run: _Run) -> Iterator[tuple[int, InputRow]]:
    """Yield the number and values of all input rows. Raises `ValueError` if the input has changed."""
    checksum = hashlib.sha256()
    bad_rows = BadRows(run.settings.max_bad_rows, key="max_bad_rows")
    for number, row in enumerate(read_input(run.settings.input, bad_rows=bad_rows)):
        checksum.update(row.id.encode())
        yield number, row
    if checksum.hexdigest() != run.record["input"]["checksum"]:
        raise ValueError(f"input: {run.settings.input.path} changed while it was read; run again")


def _count_failure(run: _Run, result: Result) -> None:
    """Count a failed row. Raises `TooManyFailures` if this process alone exceeds the limit of the run."""
    if (drop := result.dropped) is not None and drop.failed:
        run.failures.append(f"{result.source}: {drop.detail} ({drop.reason} at {drop.step})")
        _check_failures(run, len(run.failures), run.failures)


def _check_failures(run: _Run, failed: int, examples: Sequence[str]) -> None:
    share, rows = run.settings.max_failed, run.num_rows
    allowed = rows if share == 1 else min(math.ceil(share * rows - 1e-9), rows - 1)
    if failed > allowed:
        first = "".join(f"\n  {line}" for line in examples[:_SHOWN])
        raise TooManyFailures(
            f"{failed:,} of {rows:,} input rows failed, and max_failed={share} allows {allowed:,}.{first}\n"
            "What was answered is kept. Mend the recipe, or raise max_failed, and run the same command again"
        )


def _put_together(run: _Run) -> Summary:
    """Write the rows, the dropped rows and the report from all parts.

    The summary is written last, because it marks the run as finished.
    """
    summary = summary_of(run.record)
    summary.input = run.num_rows
    counted = summary.counted(results_of(run.parts))
    rows = (row for result in counted for row in result.rows)
    write_lines(run.output / _ROWS, (row for row in rows if not is_preference(row)))
    (run.output / _PREFERENCES).unlink(missing_ok=True)  # of earlier settings
    if summary.preferences:
        rows = (row for result in results_of(run.parts) for row in result.rows)
        write_lines(run.output / _PREFERENCES, filter(is_preference, rows))
    write_lines(
        run.output / "dropped.jsonl", (_dropped(result) for result in results_of(run.parts) if result.dropped)
    )
    _check_failures(
        run,
        summary.failed,
        [
            f"{reason.reason} at {reason.step}: {reason.examples[0]}"
            for reason in summary.reasons
            if reason.failed
        ],
    )
    write_report(run.output / "report.html", summary)
    write_summary(run.output, run.fingerprint, summary)
    return summary


def _dropped(result: Result) -> dict[str, Any]:
    assert result.dropped is not None
    place = {"id": result.id, "source": result.source}
    return place | asdict(result.dropped) | {"journal": [asdict(event) for event in result.events]}


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
