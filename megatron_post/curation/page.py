"""Writes `report.html`, which shows a finished run as one self-contained page."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from megatron_post.curation.mixture import MEANS
from megatron_post.curation.quality import Quality
from megatron_post.curation.samples import Samples
from megatron_post.curation.settings import Curation
from megatron_post.curation.step import ROWS, View
from megatron_post.curation.topics import Topics
from megatron_post.display import printable
from megatron_post.storage.files import write_whole
from megatron_post.synthesis.histogram import Histogram, histogram

PAGE = "report.html"
_STATES = ("yes", "no", "unknown")


def write_page(settings: Curation, report: Mapping[str, Any], samples: Samples, view: View) -> None:
    """Write the page. Every text in it is escaped, because people and models wrote the rows.

    report: the content of `report.json`. view: of all rows and columns.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    reports = {step["name"]: step["report"] for step in report["steps"]}
    page = environment.get_template("page.html.j2").render(
        r=report,
        samples=samples,
        title=f"Curation of {', '.join(source.name for source in settings.sources)}",
        measures=list(_measures(settings, view)),
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
        count=lambda number: f"{number:,}",
        share=lambda part, whole: f"{part / whole:.1%}" if whole else "0%",
        width=lambda part, whole: f"{100 * part / whole if whole else 0:.2f}%",
        mean=lambda value: "" if value is None else f"{value:,.1f}",
    )
    write_whole(Path(settings.run) / PAGE, page)


def _visible(value: Any) -> Any:
    """A text without invisible characters. What a macro of the template has made stays as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _funnel(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps with the rows that are left after each."""
    return [step | {"left": step["rows"] - step["dropped"]} for step in report["steps"]]


def _measures(settings: Curation, view: View) -> Iterator[tuple[str, int, float, Histogram]]:
    """Yield name, number, mean and histogram of each figure of the rows, over those that have it."""
    fields = [(ROWS, "turns"), (ROWS, "characters")]
    fields += [(step.column, name) for step in settings.steps for name in step.measures]
    for column, name in fields:
        values = view.read(column, [name])[name].drop_null().to_numpy().astype(np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            # Histograms have two decimals.
            found, counts = np.unique(np.round(values, 2), return_counts=True)
            own = dict(zip(found.tolist(), counts.tolist(), strict=True))
            label = name if column == ROWS else f"{column}.{name}"
            yield label, len(values), float(values.mean()), histogram(own)


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
