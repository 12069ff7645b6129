"""Writes the rows that every step keeps, the others with the step that dropped them, and the counts.

The steps are applied in their order. A row is dropped by the first step that gives a reason.
"""

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_post.curation.columns import DROPPED, FAILED, REWRITTEN, rows_of
from megatron_post.curation.mixture import DIRECTORY, MixtureWriter
from megatron_post.curation.page import PAGE, write_page
from megatron_post.curation.plan import Plan
from megatron_post.curation.rows import Row, Rows
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
    settings: Curation, plan: Plan, rows: Rows, index: dict[str, Any], view: Callable[[], View]
) -> dict[str, Any]:
    """Write the rows, the mixture, the page and `report.json`, whose content is returned.

    index: the counts of the index. view: gives a view of all columns and rows. A row has its annotations
    under the key `curation`: `id`, `source`, `place`, `dropped_by` with step and reason if it is dropped, and
    `steps` with the fields of each step that are not null.
    """
    counted = {step.column: _Counted(step) for step in settings.steps}
    sources: Counter[str] = Counter()
    kept_by_source: Counter[str] = Counter()
    directory = Path(settings.run)
    (directory / REPORT).unlink(missing_ok=True)  # it marks the other files as complete
    shutil.rmtree(directory / DIRECTORY, ignore_errors=True)
    whole = view()
    samples = Samples(settings.steps, settings.seed)
    samples.draw_clusters(whole)
    mixing = None if settings.mixture is None else MixtureWriter(settings.mixture, directory)
    with (
        line_writer(directory / KEPT) as keep,
        line_writer(directory / LEFT) as leave,
        mixing or contextlib.nullcontext(),
    ):
        for row, annotations in _annotated(settings.steps, plan, rows, index["parts"]):
            sources[row.source] += 1
            dropped_by = None
            for name, counts in counted.items():
                reason = annotations.get(name, {}).get(DROPPED)
                counts.add(annotations.get(name, {}), is_kept=dropped_by is None)
                dropped_by = dropped_by or (reason and {"step": name, "reason": reason})
            kept_by_source[row.source] += dropped_by is None
            notes: dict[str, Any] = {"id": row.id.hex(), "source": row.source, "place": row.place}
            notes |= {"dropped_by": dropped_by} if dropped_by else {}
            written = row.as_json({**notes, "steps": annotations})
            (leave if dropped_by else keep)(written)
            samples.add(written)
            if mixing is not None and dropped_by is None:
                mixing.add(row, annotations, written)
    report = {
        "key": plan.key,
        "rows": index["rows"],
        "bad_rows": index["bad_rows"],
        "bad_examples": index["bad_examples"],
        "kept": sum(kept_by_source.values()),
        "sources": [
            {"name": source.name, "rows": sources[source.name], "kept": kept_by_source[source.name]}
            for source in settings.sources
        ],
        "steps": [
            counted[step.column].as_json()
            | {"failed": _failures(plan, step, whole), "report": step.report(whole)}
            for step in settings.steps
        ],
    }
    report |= {} if mixing is None else {"mixture": mixing.finish()}
    write_page(settings, report, samples, whole)
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


class _Counted:
    """The counts of a step."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._rows = 0
        self._reasons: Counter[str] = Counter()

    def add(self, values: dict[str, Any], *, is_kept: bool) -> None:
        """is_kept: whether no earlier step has dropped the row."""
        self._rows += is_kept
        if is_kept and DROPPED in values:
            self._reasons[values[DROPPED]] += 1

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self._step.column,
            "kind": self._step.kind,
            "rows": self._rows,
            "dropped": self._reasons.total(),
            "reasons": dict(sorted(self._reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
        }
