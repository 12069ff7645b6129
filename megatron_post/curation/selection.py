"""Writes the rows that every step keeps, the others with the step that dropped them, and the counts.

The steps are applied in their order. A row is dropped by the first step that gives a reason.
"""

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_post.curation.columns import DROPPED, FAILED, REWRITTEN, rows_of
from megatron_post.curation.mixture import DIRECTORY, MixtureWriter
from megatron_post.curation.page import PAGE, write_page
from megatron_post.curation.plan import Plan
from megatron_post.curation.row import Row
from megatron_post.curation.rows import Rows
from megatron_post.curation.samples import Samples
from megatron_post.curation.settings import Curation
from megatron_post.curation.step import Step, View
from megatron_post.storage.files import line_writer, write_json
from megatron_post.storage.reading import read_object

KEPT, LEFT, REPORT = "rows.jsonl", "dropped.jsonl", "report.json"


def read_report(directory: Path, key: str) -> dict[str, Any] | None:
    """The content of `report.json` if the run of this key is finished, otherwise None."""
    path = directory / REPORT
    if not all((directory / name).exists() for name in (REPORT, KEPT, LEFT, PAGE)):
        return None
    report = read_object(path, "the report of a curation; remove it, and it is written again")
    return report if report.get("key") == key else None


def write_selection(
    settings: Curation, plan: Plan, rows: Rows, index: Mapping[str, Any], view: View
) -> dict[str, Any]:
    """Write the rows, the mixture, the page and `report.json`, whose content is returned.

    index: the counts of the index. view: of all columns and rows. A row has its annotations under the key
    `curation`: `id`, `source`, `place`, `dropped_by` with step and reason if it is dropped, and `steps` with
    the fields of each step that are not null.
    """
    directory = Path(settings.run)
    (directory / REPORT).unlink(missing_ok=True)  # it marks the other files as complete
    shutil.rmtree(directory / DIRECTORY, ignore_errors=True)
    counts = _Counts(settings)
    samples = Samples(settings.steps, settings.seed)
    samples.draw_clusters(view)
    mixing = None if settings.mixture is None else MixtureWriter(settings.mixture, directory)
    with (
        line_writer(directory / KEPT) as keep,
        line_writer(directory / LEFT) as leave,
        mixing or contextlib.nullcontext(),
    ):
        for row, annotations in _annotated(settings.steps, plan, rows, index["parts"]):
            dropped_by = counts.add(row, annotations)
            notes: dict[str, Any] = {"id": row.id.hex(), "source": row.source, "place": row.place}
            notes |= {"dropped_by": dropped_by} if dropped_by else {}
            written = row.as_json({**notes, "steps": annotations})
            (leave if dropped_by else keep)(written)
            samples.add(written)
            if mixing is not None and not dropped_by:
                mixing.add(row, annotations, written)
    report = {
        "key": plan.key,
        **{name: index[name] for name in ("rows", "bad_rows", "bad_examples")},
        **counts.as_json(plan, view),
        **({} if mixing is None else {"mixture": mixing.finish()}),
    }
    write_page(settings, report, samples, view)
    write_json(directory / REPORT, report)
    return report


def _annotated(
    steps: Sequence[Step], plan: Plan, rows: Rows, num_parts: int
) -> Iterator[tuple[Row, dict[str, dict[str, Any]]]]:
    """Yield each row with the annotations of each step that has any. Rows have their rewritten texts."""
    columns = {step.column: plan.of_step(step).column for step in steps}
    rewrites = [planned.column for planned in plan.rewrites]
    for part, found in rows.read(plan.index, range(num_parts), rewrites):
        tables = [
            rows_of(column.read(part, [field for field in column.fields if field != REWRITTEN]))
            for column in columns.values()
        ]
        for row, *values in zip(found, *tables, strict=True):
            yield row, {name: value for name, value in zip(columns, values, strict=True) if value}


def _failures(plan: Plan, step: Step, whole: View) -> int:
    """The number of rows that the passes of a step could not annotate, added over its passes."""
    failing = [each for each in plan.passes if each.step is step and FAILED in each.work.fields]
    return sum(
        len(column) - column.null_count
        for column in (whole.read(each.work.name, [FAILED])[FAILED] for each in failing)
    )


class _Counts:
    """The counts of sources and steps."""

    def __init__(self, settings: Curation) -> None:
        self._settings = settings
        self._rows: Counter[str] = Counter()  # of each source
        self._kept: Counter[str] = Counter()
        self._reached: Counter[str] = Counter()  # rows that no step before this one has dropped
        self._reasons: dict[str, Counter[str]] = {step.column: Counter() for step in settings.steps}

    def add(self, row: Row, annotations: Mapping[str, Mapping[str, Any]]) -> dict[str, str] | None:
        """Count a row. Returns the first step that drops it and its reason, or None."""
        self._rows[row.source] += 1
        for name, reasons in self._reasons.items():
            self._reached[name] += 1
            if (reason := annotations.get(name, {}).get(DROPPED)) is not None:
                reasons[reason] += 1
                return {"step": name, "reason": reason}
        self._kept[row.source] += 1
        return None

    def as_json(self, plan: Plan, view: View) -> dict[str, Any]:
        """Their part of `report.json`, with the report of each step."""
        return {
            "kept": self._kept.total(),
            "sources": [
                {"name": source.name, "rows": self._rows[source.name], "kept": self._kept[source.name]}
                for source in self._settings.sources
            ],
            "steps": [
                {
                    "name": step.column,
                    "kind": step.kind,
                    "rows": self._reached[step.column],
                    "dropped": reasons.total(),
                    "reasons": dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
                    "failed": _failures(plan, step, view),
                    "report": step.report(view),
                }
                for step, reasons in zip(self._settings.steps, self._reasons.values(), strict=True)
            ],
        }
