"""Which rows and columns each pass sees, and the column that is written from what it gives."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_post.curation.columns import DROPPED, Column, aligned
from megatron_post.curation.plan import Plan, Planned
from megatron_post.curation.step import ROWS, View
from megatron_post.curation.tools import Tools


class Seen:
    """What the passes of a run see. A pass sees the rows of its sources that no earlier step drops."""

    def __init__(self, plan: Plan, num_parts: int) -> None:
        self._plan, self.num_parts = plan, num_parts

    def kept_of(self, planned: Planned, part: int) -> np.ndarray | None:
        """The places in a part of the rows that a pass sees, int64 [n]. None: it sees all rows."""
        if not planned.work.kept_only and not planned.step.sources:
            return None
        sources = self._plan.index.read(part, ["source"])["source"]
        names = pa.array(planned.step.sources, pa.string())
        seen = np.array(pc.is_in(sources, names)) if planned.step.sources else np.ones(len(sources), bool)
        for each in planned.drops if planned.work.kept_only else ():
            seen &= each.column.read(part, [DROPPED])[DROPPED].is_null().to_numpy()
        return np.flatnonzero(seen)

    def view(self, planned: Planned, tools: Tools) -> View:
        """The view of a pass, with the columns that it reads."""
        readable = {name: self._plan.column(name) for name in (ROWS, *planned.work.reads)}
        return self._view(readable, self._kept(planned), planned.scratch, tools)

    def everything(self, tools: Tools) -> View:
        """A view of all rows and columns."""
        columns = {each.work.name: each.column for each in self._plan.passes}
        return self._view({ROWS: self._plan.index, **columns}, None, Path(), tools)

    def write_all(self, planned: Planned, values: Any) -> None:
        """Write the parts of a column that are missing. values: of all rows that the pass sees."""
        index, column = self._plan.index, planned.column
        ids = index.read_all(self.num_parts, ["id"])["id"]
        table = aligned(values, column.schema, self._kept(planned), ids)
        for part, (start, stop) in enumerate(pairwise(self._starts)):
            if not column.path(part).exists():
                column.write(part, table.slice(start, stop - start))

    def _view(self, columns: dict[str, Column], kept: np.ndarray | None, scratch: Path, tools: Tools) -> View:
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

        num_rows = self._starts[-1] if kept is None else len(kept)
        return View(num_rows, self.num_parts, read, part, scratch, tools)

    def _kept(self, planned: Planned) -> np.ndarray | None:
        """The places of the rows that a pass sees, int64 [n]. None: it sees all rows."""
        parts = [self.kept_of(planned, part) for part in range(self.num_parts)]
        found = [start + own for start, own in zip(self._starts[:-1], parts, strict=True) if own is not None]
        return np.concatenate(found) if found else None

    @cached_property
    def _starts(self) -> list[int]:
        """The place of the first row of each part, and the number of rows."""
        sizes = [self._plan.index.read(part, ["number"]).num_rows for part in range(self.num_parts)]
        return [0, *np.cumsum(sizes).tolist()]
