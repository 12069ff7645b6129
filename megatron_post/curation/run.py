"""`megatron-post curate` makes the columns of all steps, and writes the rows that every step keeps.

The passes run one after the other. Process `rank` of `size` works on the parts (or blocks) rank, rank + size
and so on, and waits for the others after each pass. What only one process may do is done by the first one
that comes to it. Every file is complete or absent, so a run that is restarted continues with the missing
files, and it writes the same bytes as a run that was not interrupted.
"""

import asyncio
import inspect
import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from megatron_post.curation.columns import DROPPED, FAILED, Column, aligned, read_table, write_table
from megatron_post.curation.page import PAGE
from megatron_post.curation.plan import Plan, Planned, plan_of
from megatron_post.curation.rows import Rows
from megatron_post.curation.selection import read_report, write_selection
from megatron_post.curation.settings import Curation
from megatron_post.curation.step import ROWS, Batch, BlockPass, RowPass, View, WholePass
from megatron_post.curation.tools import OpenRanker, Tools
from megatron_post.data.rows import BadRows
from megatron_post.parallel.environment import share_of
from megatron_post.storage.files import write_json
from megatron_post.storage.lock import turn_in
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
        self.num_parts, self.num_rows = 0, 0

    async def run(self) -> dict[str, Any]:
        if (report := read_report(self.directory, self.plan.key)) is not None:
            self.say(f"{self.directory} is finished: {_counts(report)}. Nothing was done")
            return report
        index = self._index()
        self.num_parts, self.num_rows = index["parts"], index["rows"]
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
                if missing := planned.column.missing(self.num_parts):
                    with turn_in(self.directory):
                        planned.column.describe(planned.record)
                    self.begins(planned.work.name)
                    self.say(f"{planned.work.name}: {len(missing):,} of {self.num_parts:,} parts are missing")
                    await self._make(planned, tools)
                # A process that was killed after the last part has left the blocks.
                shutil.rmtree(planned.column.directory / "scratch", ignore_errors=True)
                self._check_failures(planned)
            with turn_in(self.directory):
                report = read_report(self.directory, self.plan.key)
                if report is None:
                    self.begins("selection")
                    self.say("writing the selected rows")
                    report = write_selection(
                        self.settings,
                        self.plan,
                        self.rows,
                        index,
                        lambda: self._view([*self.plan.passes], None, Path(), tools),
                    )
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

    async def _make(self, planned: Planned, tools: Tools) -> None:
        work = planned.work
        if isinstance(work, RowPass):
            await self._make_parts(planned, work, tools)
        elif isinstance(work, WholePass):
            with turn_in(self.directory):
                if planned.column.missing(self.num_parts):
                    kept = self._kept(planned)
                    view = self._view(self._read_by(planned), kept, Path(), tools)
                    self._write_all(planned.column, work.annotate(view), kept)
        else:
            assert isinstance(work, BlockPass)
            await self._make_blocks(planned, work, tools)

    async def _make_parts(self, planned: Planned, work: RowPass, tools: Tools) -> None:
        column, index = planned.column, self.plan.index
        own = [part for part in column.missing(self.num_parts) if part % self.size == self.rank]
        rewrites = [each.column for each in planned.rewrites]
        for part, rows in self.rows.read(index, own, rewrites):
            kept = np.flatnonzero(self._is_seen(planned, part)) if _sees_some(planned) else None
            tables = {name: self.plan.column(name).read(part) for name in (ROWS, *work.reads)}
            if kept is not None:
                rows = [rows[position] for position in kept]
                tables = {name: table.take(kept) for name, table in tables.items()}
            values = work.annotate(Batch(rows, tables, tools))
            if inspect.isawaitable(values):
                values = await values
            ids = index.read(part, ["id"])["id"]
            column.write(part, aligned(values, column.schema, kept, ids))
        await self._wait(lambda: column.missing(self.num_parts), f"{work.name}: {{}} parts")

    async def _make_blocks(self, planned: Planned, work: BlockPass, tools: Tools) -> None:
        scratch = planned.column.directory / "scratch"
        counted = scratch / "blocks.json"
        kept = self._kept(planned)
        view = self._view(self._read_by(planned), kept, scratch, tools)
        with turn_in(self.directory):
            if not planned.column.missing(self.num_parts):
                return  # another process has finished the pass, and removed the blocks
            if not counted.exists():
                scratch.mkdir(parents=True, exist_ok=True)
                write_json(counted, {"blocks": work.prepare(view)})
            count = read_object(counted, "the number of blocks")["blocks"]
        paths = [scratch / f"block-{block:06d}.parquet" for block in range(count)]
        schema = pa.schema({"row": pa.int64(), **work.fields})
        for block in range(self.rank, count, self.size):
            if not paths[block].exists() and planned.column.missing(self.num_parts):
                values = work.block(view, block)
                table = pa.table({name: pa.array(values[name], kind.type) for name, kind in
                                  zip(schema.names, schema, strict=True)})  # fmt: skip
                write_table(paths[block], table)

        def missing() -> Sequence[Path]:
            is_made = not planned.column.missing(self.num_parts)
            return [] if is_made else [path for path in paths if not path.exists()]

        await self._wait(missing, f"{work.name}: {{}} blocks")
        with turn_in(self.directory):
            if planned.column.missing(self.num_parts):
                self._write_all(planned.column, _joined(paths, schema, view.num_rows), kept)
            shutil.rmtree(scratch, ignore_errors=True)

    async def _wait(self, missing: Callable[[], Sequence[Any]], what: str) -> None:
        """Wait until other processes have written all files. what: has `{}` for their number."""
        said = -1
        while left := len(missing()):
            if left != said:
                self.say("waiting for other processes. " + what.format(f"{left:,}") + " are missing")
            said = left
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)

    def _write_all(self, column: Column, values: Any, kept: np.ndarray | None) -> None:
        """Write a column from the values of all rows that a pass sees."""
        ids = pa.concat_tables([self.plan.index.read(part, ["id"]) for part in range(self.num_parts)])["id"]
        table = aligned(values, column.schema, kept, ids)
        for part, (start, stop) in enumerate(pairwise(self._starts)):
            if not column.path(part).exists():
                column.write(part, table.slice(start, stop - start))

    def _read_by(self, planned: Planned) -> list[Planned]:
        return [each for each in self.plan.passes if each.work.name in planned.work.reads]

    def _view(
        self, readable: Sequence[Planned], kept: np.ndarray | None, scratch: Path, tools: Tools
    ) -> View:
        columns = {ROWS: self.plan.index, **{each.work.name: each.column for each in readable}}

        def read(name: str, fields: Sequence[str]) -> pa.Table:
            table = columns[name].read_all(self.num_parts, fields)
            return table if kept is None else table.take(kept)

        def part(number: int, name: str, fields: Sequence[str]) -> tuple[int, pa.Table]:
            start, stop = self._starts[number : number + 2]
            table = columns[name].read(number, fields)
            if kept is None:
                return start, table
            first, last = np.searchsorted(kept, [start, stop]).tolist()
            return first, table.take(kept[first:last] - start)

        num_rows = self.num_rows if kept is None else len(kept)
        return View(num_rows, self.num_parts, read, part, scratch, tools)

    @cached_property
    def _starts(self) -> list[int]:
        """The place of the first row of each part, and the number of rows."""
        sizes = [self.plan.index.read(part, ["number"]).num_rows for part in range(self.num_parts)]
        return [0, *np.cumsum(sizes).tolist()]

    def _kept(self, planned: Planned) -> np.ndarray | None:
        """The places of the rows that a pass sees, int64. None: it sees all rows."""
        if not _sees_some(planned):
            return None
        return np.flatnonzero(
            np.concatenate([self._is_seen(planned, part) for part in range(self.num_parts)])
        )

    def _is_seen(self, planned: Planned, part: int) -> np.ndarray:
        """Whether a pass sees each row of a part, bool."""
        sources = self.plan.index.read(part, ["source"])["source"]
        names = pa.array(planned.step.sources, pa.string())
        seen = np.array(pc.is_in(sources, names)) if planned.step.sources else np.ones(len(sources), bool)
        for each in planned.drops if planned.work.kept_only else ():
            seen &= each.column.read(part, [DROPPED])[DROPPED].is_null().to_numpy()
        return seen

    def _check_failures(self, planned: Planned) -> None:
        """Raise `TooManyFailures` if a column has more failures than `max_failed` allows."""
        if FAILED not in planned.work.fields:
            return
        failures = planned.column.read_all(self.num_parts, [FAILED])[FAILED].drop_null()
        share, rows = self.settings.max_failed, self.num_rows
        allowed = rows if share == 1 else min(math.ceil(share * rows - 1e-9), rows - 1)
        if len(failures) > allowed:
            first = "".join(f"\n  {reason}" for reason in failures.slice(0, _SHOWN).to_pylist())
            raise TooManyFailures(
                f"{planned.work.name}: {len(failures):,} of {rows:,} rows could not be annotated, and "
                f"max_failed={share} allows {allowed:,}. The first reasons:{first}\nMend the step, its model "
                f"or its prompt. Or raise max_failed, and run the same command again"
            )


def _sees_some(planned: Planned) -> bool:
    """Whether there may be rows that a pass does not see."""
    return planned.work.kept_only or bool(planned.step.sources)


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
