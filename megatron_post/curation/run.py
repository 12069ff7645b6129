"""`megatron-post curate` makes the columns of all steps, and writes the rows that every step keeps.

The passes run one after the other. Process `rank` of `size` begins with the parts (or blocks) rank, rank +
size and so on, and then takes those that no other process is working on. So the processes need not run at the
same time, and each of them can finish the run alone. What only one process may do is done by the first one
that comes to it. Every file is complete or absent, so a run that is restarted continues with the missing
files, and it writes the same bytes as a run that was not interrupted.
"""

import asyncio
import contextlib
import inspect
import math
import os
import shutil
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from megatron_post.curation.columns import FAILED, aligned, read_table, write_table
from megatron_post.curation.page import PAGE
from megatron_post.curation.plan import Plan, Planned, plan_of
from megatron_post.curation.rows import Rows
from megatron_post.curation.seen import Seen
from megatron_post.curation.selection import read_report, write_selection
from megatron_post.curation.settings import Curation
from megatron_post.curation.step import ROWS, Batch, BlockPass, RowPass, WholePass
from megatron_post.curation.tools import OpenRanker, Tools
from megatron_post.data.rows import BadRows
from megatron_post.parallel.environment import share_of
from megatron_post.storage.files import write_json
from megatron_post.storage.lock import claim, turn_in
from megatron_post.storage.reading import read_object

_SECONDS_BETWEEN_LOOKS = 0.25  # for the files of other processes
_SHOWN = 10  # failures in a message


class TooManyFailures(ValueError):
    """A step could not annotate more rows than `max_failed` allows."""


def curate(
    settings: Curation,
    *,
    rank: int | None = None,
    size: int | None = None,
    open_ranker: OpenRanker | None = None,
    console: Console,
    begins: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Run process `rank` of `size`, by default as in `share_of`. Returns the content of `report.json`.

    open_ranker: `rounds.ranking.open_ranker`, which steps with a classifier need.
    begins: is called with the name of each part of the run when it begins: `ROWS`, each pass that has work to
    do, and "selection".

    Raises `ValueError` for sources and columns that cannot be read, bad rows (`TooManyBadRows`), a model that
    does not work, a full disk and too many failures (`TooManyFailures`). Everything that was finished stays.
    """
    rank, size = share_of(rank, size, os.environ)
    rows = Rows(settings.sources, settings.reasoning, part_rows=settings.part_rows)
    plan = plan_of(settings, rows.record())
    Path(settings.run).mkdir(parents=True, exist_ok=True)
    return asyncio.run(_Run(settings, rows, plan, rank, size, open_ranker, console, begins).run())


class _Run:
    """One process of a run."""

    def __init__(
        self,
        settings: Curation,
        rows: Rows,
        plan: Plan,
        rank: int,
        size: int,
        open_ranker: OpenRanker | None,
        console: Console,
        begins: Callable[[str], None],
    ) -> None:
        self.settings, self.rows, self.plan = settings, rows, plan
        self.rank, self.size, self.console, self.begins = rank, size, console, begins
        self.open_ranker = open_ranker
        self.directory = Path(settings.run)

    async def run(self) -> dict[str, Any]:
        if (report := read_report(self.directory, self.plan.key)) is not None:
            self.say(f"{self.directory} is finished: {_counts(report)}. Nothing was done")
            return report
        index = self._index()
        seen = Seen(self.plan, index["parts"])
        journal = self.directory / "journal"
        tools = Tools(
            self.settings.models,
            journal=journal,
            writer=self.rank,
            rows_in_flight=self.settings.rows_in_flight,
            open_ranker=self.open_ranker,
        )
        async with tools:
            for planned in self.plan.passes:
                if missing := planned.column.missing(seen.num_parts):
                    with turn_in(self.directory):
                        planned.column.describe(planned.record)
                    self.begins(planned.work.name)
                    self.say(f"{planned.work.name}: {len(missing):,} of {seen.num_parts:,} parts are missing")
                    await self._make(planned, seen, tools)
                # A process that was killed after the last part has left the blocks.
                shutil.rmtree(planned.scratch, ignore_errors=True)
                self._check_failures(planned, index)
            with turn_in(self.directory):
                report = read_report(self.directory, self.plan.key)
                if report is None:
                    self.begins("selection")
                    self.say("writing the selected rows")
                    view = seen.everything(tools)
                    report = write_selection(self.settings, self.plan, self.rows, index, view)
        self.say(f"{self.directory}: {_counts(report)}. {self.directory / PAGE} shows them")
        return report

    def say(self, text: str) -> None:
        who = f"process {self.rank} of {self.size}: " if self.size > 1 else ""
        self.console.print(f"{who}{text}", highlight=False, soft_wrap=True)

    def _index(self) -> dict[str, Any]:
        """The counts of the index, which is written if it is missing."""
        path = self.plan.index.directory / "index.json"
        with turn_in(self.directory):
            if not path.exists():
                self.begins(ROWS)
                self.say("reading the sources")
                bad_rows = BadRows(self.settings.max_bad_rows, key="max_bad_rows")
                parts = self.rows.write_index(self.plan.index, bad_rows)
                if not parts:
                    raise ValueError("sources: they have no good row")
                for line in self.rows.counts.summary():
                    self.say(f"{line}. The written rows keep them")
                self.plan.index.describe(self.plan.index_record)
                rows = self.plan.index.read_all(parts, ["source"]).num_rows
                bad = {"bad_rows": bad_rows.count, "bad_examples": bad_rows.examples}
                shutil.rmtree(self.plan.index.directory / "draft", ignore_errors=True)
                # This file comes last, because it marks the index as complete.
                write_json(path, {"parts": parts, "rows": rows, **bad})
        return read_object(path, "the counts of an index; remove its directory, and it is written again")

    async def _make(self, planned: Planned, seen: Seen, tools: Tools) -> None:
        match planned.work:
            case RowPass():
                await self._make_parts(planned, planned.work, seen, tools)
            case BlockPass():
                await self._make_blocks(planned, planned.work, seen, tools)
            case WholePass():
                with turn_in(self.directory):
                    if not planned.column.is_complete(seen.num_parts):
                        values = planned.work.annotate(seen.view(planned, tools))
                        seen.write_all(planned, values)

    async def _make_parts(self, planned: Planned, work: RowPass, seen: Seen, tools: Tools) -> None:
        column, index = planned.column, self.plan.index
        rewrites = [each.column for each in planned.rewrites]

        async def make(parts: Iterable[int]) -> None:
            for part, rows in self.rows.read(index, parts, rewrites):
                kept = seen.kept_of(planned, part)
                tables = {name: self.plan.column(name).read(part) for name in (ROWS, *work.reads)}
                if kept is not None:
                    rows = [rows[position] for position in kept]
                    tables = {name: table.take(kept) for name, table in tables.items()}
                values = work.annotate(Batch(rows, tables, tools))
                if inspect.isawaitable(values):
                    values = await values
                ids = index.read(part, ["id"])["id"]
                column.write(part, aligned(values, column.schema, kept, ids))

        await self._share(planned, seen.num_parts, lambda part: not column.path(part).exists(), make, "parts")

    async def _make_blocks(self, planned: Planned, work: BlockPass, seen: Seen, tools: Tools) -> None:
        column, scratch = planned.column, planned.scratch
        counted = scratch / "blocks.json"
        view = seen.view(planned, tools)
        with turn_in(self.directory):
            if column.is_complete(seen.num_parts):
                return  # another process has finished the pass, and removed the blocks
            if not counted.exists():
                scratch.mkdir(parents=True, exist_ok=True)
                write_json(counted, {"blocks": work.prepare(view)})
            count = read_object(counted, "the number of blocks")["blocks"]
        paths = [scratch / f"block-{block:06d}.parquet" for block in range(count)]
        schema = pa.schema({"row": pa.int64(), **work.fields})

        def is_missing(block: int) -> bool:
            # The order matters: the blocks are removed after the column has become complete.
            return not paths[block].exists() and not column.is_complete(seen.num_parts)

        async def make(blocks: Iterable[int]) -> None:
            for block in blocks:
                values = work.block(view, block)
                arrays = [pa.array(values[field.name], field.type) for field in schema]
                write_table(paths[block], pa.table(arrays, schema=schema))

        await self._share(planned, count, is_missing, make, "blocks")
        with turn_in(self.directory):
            if not column.is_complete(seen.num_parts):
                seen.write_all(planned, _joined(paths, schema, view.num_rows))
            shutil.rmtree(scratch, ignore_errors=True)

    async def _share(
        self,
        planned: Planned,
        count: int,
        is_missing: Callable[[int], bool],
        make: Callable[[Iterable[int]], Awaitable[None]],
        what: str,
    ) -> None:
        """Make pieces 0 to `count` of a pass together with the other processes, until none is missing.

        A process begins with the pieces of its rank. Then it takes those that no process is working on, so
        that a process that was killed or has not begun holds up no other. make: makes the pieces that it is
        given, one at a time. what: a name for the pieces.
        """
        lock = planned.column.directory / ".lock"
        taken = 0

        def claimed(pieces: Iterable[int]) -> Generator[int, None, None]:
            nonlocal taken
            for piece in pieces:
                if is_missing(piece):
                    with claim(lock, piece) as is_own:
                        # Another process may have made it before this one had the lock.
                        if is_own and is_missing(piece):
                            taken += 1
                            yield piece

        async def make_claimed(pieces: Iterable[int]) -> None:
            # The traceback of an error would keep a generator that is not closed, and the lock in it.
            with contextlib.closing(claimed(pieces)) as own:
                await make(own)

        await make_claimed(range(self.rank, count, self.size))
        said = -1
        while left := sum(map(is_missing, range(count))):
            before = taken
            await make_claimed(range(count))
            if taken == before:
                if left != said:
                    of = f"{left:,} {what} of {planned.work.name}"
                    self.say(f"waiting for other processes, which have not finished {of}")
                said = left
                await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)

    def _check_failures(self, planned: Planned, index: Mapping[str, Any]) -> None:
        """Raise `TooManyFailures` if a column has more failures than `max_failed` allows."""
        if FAILED not in planned.work.fields:
            return
        failures = planned.column.read_all(index["parts"], [FAILED])[FAILED].drop_null()
        share, rows = self.settings.max_failed, index["rows"]
        allowed = rows if share == 1 else min(math.ceil(share * rows - 1e-9), rows - 1)
        if len(failures) > allowed:
            first = "".join(f"\n  {reason}" for reason in failures.slice(0, _SHOWN).to_pylist())
            raise TooManyFailures(
                f"{planned.work.name}: {len(failures):,} of {rows:,} rows could not be annotated, and "
                f"max_failed={share} allows {allowed:,}. The first reasons:{first}\nMend the step, its model "
                f"or its prompt. Or raise max_failed, and run the same command again"
            )


def _joined(paths: Sequence[Path], schema: pa.Schema, num_rows: int) -> dict[str, Any]:
    """The values of all blocks in the order of the rows. Rows in no block have null."""
    parts = [read_table(path) for path in paths]
    table = pa.concat_tables([schema.empty_table(), *parts])
    where = np.full(num_rows, -1, np.int64)
    rows = table["row"].to_numpy()
    assert len(np.unique(rows)) == len(rows), "a row is in two blocks"
    where[rows] = np.arange(len(rows))
    placed = table.take(pa.array(where, mask=where < 0))
    return {name: placed[name] for name in schema.names[1:]}


def _counts(report: dict[str, Any]) -> str:
    dropped = ", ".join(f"{step['name']} {step['dropped']:,}" for step in report["steps"] if step["dropped"])
    return f"{report['kept']:,} of {report['rows']:,} rows kept" + (
        f", dropped by {dropped}" if dropped else ""
    )
