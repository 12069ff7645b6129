"""Writes `report.html`, which shows a finished run as one self-contained page."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_post.curation.mixture import MEANS
from megatron_post.curation.quality import Quality
from megatron_post.curation.samples import Samples
from megatron_post.curation.settings import Curation
from megatron_post.curation.step import ROWS, View
from megatron_post.curation.topics import Topics
from megatron_post.pages.charts import histogram
from megatron_post.pages.page import figures, render
from megatron_post.storage.files import write_whole

PAGE = "report.html"
_STATES = ("yes", "no", "unknown")


def write_page(settings: Curation, report: Mapping[str, Any], samples: Samples, view: View) -> None:
    """Write the page. Every text in it is escaped, because people and models wrote the rows.

    report: the content of `report.json`. view: of all rows and columns.
    """
    reports = {step["name"]: step["report"] for step in report["steps"]}
    page = render(
        Path(__file__).parent / "page.html.j2",
        r=report,
        samples=samples,
        title=f"Curation of {', '.join(source.name for source in settings.sources)}",
        charts=figures(_charts(settings, view)),
        matrices={
            step.column: _matrix(reports[step.column]["top_and_full_marks"])
            for step in settings.steps
            if isinstance(step, Quality) and step.reward and step.marks is not None
        },
        topics={
            step.column: _topic_table(reports[step.column]["topics"])
            for step in settings.steps
            if isinstance(step, Topics)
        },
        steps=_funnel(report),
        states=_STATES,
        means=MEANS,
        mean=lambda value: "" if value is None else f"{value:,.1f}",
    )
    write_whole(Path(settings.run) / PAGE, page)


def _funnel(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps with the rows that are left after each."""
    return [step | {"left": step["rows"] - step["dropped"]} for step in report["steps"]]


def _charts(settings: Curation, view: View) -> Iterator[Markup]:
    """Yield a histogram of each figure of the rows, over those that have it."""
    fields = [(ROWS, "turns"), (ROWS, "characters")]
    fields += [(step.column, name) for step in settings.steps for name in step.measures]
    for column, name in fields:
        values = view.read(column, [name])[name].drop_null().to_numpy().astype(np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            label = name if column == ROWS else f"{column}.{name}"
            title = f"{label}: {len(values):,} row(s), mean {values.mean():.4g}"
            yield histogram(title, {"rows": values}, x=label)


def _matrix(by_source: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, Any]:
    """The counts of all sources, and the share of the rows in which only one of the two is for the row."""
    total = {a: {b: sum(own[a][b] for own in by_source.values()) for b in _STATES} for a in _STATES}
    known = sum(total[a][b] for a in ("yes", "no") for b in ("yes", "no"))
    return {"total": total, "known": known, "differ": total["yes"]["no"] + total["no"]["yes"]}


def _topic_table(topics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows by topic and source. Topics without rows are left out."""
    sources = list(topics[0]["rows"]) if topics else []
    coarse: dict[str, dict[str, Any]] = {}
    for each in topics:
        own = coarse.setdefault(each["coarse"], {"rows": dict.fromkeys(sources, 0), "parts": {}})
        for name, number in each["rows"].items():
            own["rows"][name] += number
        if sum(each["rows"].values()):
            own["parts"][each["fine"]] = each["rows"]
    totals = {name: sum(own["rows"][name] for own in coarse.values()) for name in sources}
    return {"sources": sources, "coarse": {k: v for k, v in coarse.items() if v["parts"]}, "totals": totals}
