"""Renders records as one self-contained HTML page, with each run beside the first run."""

from collections.abc import Sequence

from markupsafe import Markup

from megatron_post.bench.compare import compare, differences, groups
from megatron_post.bench.record import Record
from megatron_post.bench.tables import median_and_interval
from megatron_post.pages.charts import histogram, lines, stacked
from megatron_post.pages.page import bullets, document, element, figures, html_of, table

# The newest runs are drawn. More would hide each other.
_DRAWN = 4
_EXPLANATION = (
    "The table shows medians. The brackets show the interval that holds the median with 95% confidence, or "
    "the smallest and the largest of fewer than six samples. A run is called better or worse than the first "
    "run if the two intervals do not overlap. The samples of one run share the state of the machine, so "
    "repeat important measurements."
)


def page(records: Sequence[Record]) -> str:
    """The whole document."""
    found = groups(records)
    counted = f"{len(records)} records of {len(found)} benchmarks, {records[0].date} to {records[-1].date}."
    introduction = element("p", f"{counted} {_EXPLANATION}", kind="faint")
    return document("megatron-post bench", [introduction, *(part for runs in found for part in _group(runs))])


def _group(runs: list[Record]) -> list[Markup]:
    first, last = runs[0], runs[-1]
    names = [f"{number}: {record.date[:16]}" for number, record in enumerate(runs, start=1)]
    drawn = dict(list(zip(names, runs, strict=True))[-_DRAWN:])
    environment = element("summary", "environment of the last run") + _pairs(last.environment)
    return [
        element("h2", f"{first.benchmark}: {first.subject}"),
        _pairs(last.settings),
        _figures(names, runs),
        _differences(names, runs),
        figures([*_samples(drawn), _phases(drawn), _tokens(drawn)]),
        *([element("pre", last.text, kind="wide")] if last.text else []),
        bullets(dict.fromkeys(note for record in runs for note in record.notes)),
        element("details", environment),
    ]


def _pairs(values: dict[str, str]) -> Markup:
    return element("p", "; ".join(f"{name}: {value}" for name, value in values.items()), kind="faint")


def _figures(names: Sequence[str], runs: Sequence[Record]) -> Markup:
    units = {name: figure.unit for record in runs for name, figure in record.figures.items()}
    rows = [[f"{name}, {unit}", *(_cell(runs[0], run, name) for run in runs)] for name, unit in units.items()]
    return table(["", *names], rows)


def _cell(first: Record, record: Record, name: str) -> Markup:
    figure = record.figures.get(name)
    if figure is None:
        return Markup("")
    text = html_of(median_and_interval(figure))
    verdict = compare(first, record).get(name) if record is not first else None
    if verdict is not None:
        text += Markup("<br>") + element("span", verdict, kind=verdict.kind.split()[0])
    return text


def _differences(names: Sequence[str], runs: Sequence[Record]) -> Markup:
    """A list of what differs between each later run and the first."""
    items = [
        f"Run {name} differs from the first in "
        + ("; ".join(differences(runs[0], record)) or "nothing that was recorded")
        for name, record in zip(names[1:], runs[1:], strict=True)
    ]
    return bullets(items)


def _samples(runs: dict[str, Record]) -> list[Markup]:
    """Two charts of the first figure with more than two samples: in order, and their distribution."""
    found = (n for r in runs.values() for n, figure in r.figures.items() if len(figure.samples) > 2)
    name = next(found, None)
    if name is None:
        return []
    series = {run: r.figures[name].samples for run, r in runs.items() if name in r.figures}
    unit = next(r.figures[name].unit for r in runs.values() if name in r.figures)
    in_order = {run: list(enumerate(samples, start=1)) for run, samples in series.items()}
    axis = f"{name}, {unit}"
    return [
        lines(f"{name} by sample", in_order, x="sample", y=axis),
        histogram(f"{name}: distribution of the samples", series, x=axis),
    ]


def _phases(runs: dict[str, Record]) -> Markup:
    rows = {
        run: {n.removeprefix("phase: "): f.median for n, f in r.figures.items() if n.startswith("phase: ")}
        for run, r in runs.items()
    }
    return stacked("Phases of a step: medians of the mean over ranks", rows, x="seconds")


def _tokens(runs: dict[str, Record]) -> Markup:
    rows = {}
    for run, record in runs.items():
        found = {n.split("tokens/s")[0].strip(): f for n, f in record.figures.items() if "tokens/s/" in n}
        if {"trained", "padded", ""} <= set(found):
            real, trained = found[""].median, found["trained"].median
            padding = max(0.0, found["padded"].median - real)
            rows[run] = {"trained": trained, "real, without loss": real - trained, "padding": padding}
    return stacked("Tokens a second on each GPU or rank: medians", rows, x="tokens/s")
