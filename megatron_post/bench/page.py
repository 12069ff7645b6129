"""Renders records as one self-contained HTML page, with each run beside the first run."""

from collections.abc import Sequence

from megatron_post.bench.compare import compare, differences, groups
from megatron_post.bench.record import Record
from megatron_post.bench.tables import median_and_interval, number
from megatron_post.display import html_text
from megatron_post.plan.page import COLOURS, STYLE, WIDTH, bar, key, svg
from megatron_post.rounds.charts import histogram, lines

# A chart has colours for this many runs. The newest are drawn.
_DRAWN = 4
_LABEL, _ROW = 150, 28
_STYLE = """
figure { display: inline-block; width: 480px; margin: 0 20px 12px 0; vertical-align: top }
figcaption { font-size: .9rem } table { border-collapse: collapse; margin: .6rem 0; font-size: .85rem }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap } .scroll { overflow-x: auto }
.better { color: #2c7a4b } .worse { color: #b3564d } .changed { font-weight: 600 }
.no, .measured { color: var(--faint) }
pre { overflow-x: auto; font-size: .75rem; border: 1px solid var(--line); padding: .5rem }
ul.notes { padding-left: 1.2rem; font-size: .85rem } details { margin: .5rem 0 }
@media (prefers-color-scheme: dark) { .better { color: #86bd9c } .worse { color: #e09a92 } }
"""
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
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>megatron-post bench</title>'
        f"<style>{STYLE}{_STYLE}</style></head><body>\n<h1>megatron-post bench</h1>\n"
        f'<p class="faint">{html_text(counted)} {html_text(_EXPLANATION)}</p>\n'
        + "".join(_group(runs) for runs in found)
        + "</body></html>\n"
    )


def _group(runs: list[Record]) -> str:
    first = runs[0]
    names = [f"{number}: {record.date[:16]}" for number, record in enumerate(runs, start=1)]
    drawn = dict(list(zip(names, runs, strict=True))[-_DRAWN:])
    return (
        f"<h2>{html_text(first.benchmark)}: {html_text(first.subject)}</h2>"
        + _pairs(runs[-1].settings)
        + f'<div class="scroll">{_figures(names, runs)}</div>'
        + _differences(names, runs)
        + _samples(drawn)
        + _phases(drawn)
        + _tokens(drawn)
        + "".join(f"<pre>{html_text(record.text)}</pre>" for record in runs[-1:] if record.text)
        + _list(dict.fromkeys(note for record in runs for note in record.notes))
        + f"<details><summary>environment of the last run</summary>{_pairs(runs[-1].environment)}</details>"
    )


def _pairs(values: dict[str, str]) -> str:
    text = "; ".join(f"{name}: {value}" for name, value in values.items())
    return f'<p class="faint">{html_text(text)}</p>'


def _list(items: dict[str, None]) -> str:
    lines = "".join(f"<li>{html_text(item)}</li>" for item in items)
    return f'<ul class="notes">{lines}</ul>' if lines else ""


def _figures(names: Sequence[str], runs: Sequence[Record]) -> str:
    rows = []
    units = {name: figure.unit for record in runs for name, figure in record.figures.items()}
    for name, unit in units.items():
        cells = "".join(_cell(runs[0], record, name) for record in runs)
        label = f'{html_text(name)} <span class="faint">{html_text(unit)}</span>'
        rows.append(f'<tr><td class="number">{label}</td>{cells}</tr>')
    head = "".join(f"<th>{html_text(name)}</th>" for name in ("", *names))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _cell(first: Record, record: Record, name: str) -> str:
    figure = record.figures.get(name)
    if figure is None:
        return "<td></td>"
    text = median_and_interval(figure)
    verdict = compare(first, record).get(name) if record is not first else None
    if verdict is not None:
        text += f'<br/><span class="{verdict.kind.split()[0]}">{verdict}</span>'
    return f'<td class="number">{text}</td>'


def _differences(names: Sequence[str], runs: Sequence[Record]) -> str:
    """A list of what differs between each later run and the first."""
    items = [
        f"Run {name} differs from the first in "
        + ("; ".join(differences(runs[0], record)) or "nothing that was recorded")
        for name, record in zip(names[1:], runs[1:], strict=True)
    ]
    return _list(dict.fromkeys(items))


def _samples(runs: dict[str, Record]) -> str:
    """Two charts of the first figure with more than two samples: in order, and their distribution."""
    found = (n for r in runs.values() for n, figure in r.figures.items() if len(figure.samples) > 2)
    name = next(found, None)
    if name is None:
        return ""
    series = {run: r.figures[name].samples for run, r in runs.items() if name in r.figures}
    unit = next(r.figures[name].unit for r in runs.values() if name in r.figures)
    in_order = {run: list(enumerate(samples, start=1)) for run, samples in series.items()}
    title = f"{name}, {unit}"
    return lines(f"{title}, by sample", dict(in_order)) + histogram(
        f"{title}: share of samples", dict(series)
    )


def _phases(runs: dict[str, Record]) -> str:
    rows = {
        run: {n.removeprefix("phase: "): f.median for n, f in r.figures.items() if n.startswith("phase: ")}
        for run, r in runs.items()
    }
    return _stacked("phases of a step: medians of the mean over ranks, s", rows)


def _tokens(runs: dict[str, Record]) -> str:
    rows = {}
    for run, record in runs.items():
        found = {n.split("tokens/s")[0].strip(): f for n, f in record.figures.items() if "tokens/s/" in n}
        if {"trained", "padded", ""} <= set(found):
            real, trained = found[""].median, found["trained"].median
            padding = max(0.0, found["padded"].median - real)
            rows[run] = {"trained": trained, "real, without loss": real - trained, "padding": padding}
    return _stacked("tokens a second on each GPU or rank, medians", rows)


def _stacked(title: str, rows: dict[str, dict[str, float]]) -> str:
    """A bar for each run, divided into parts."""
    rows = {name: parts for name, parts in rows.items() if parts}
    if not rows:
        return ""
    names = list(dict.fromkeys(part for parts in rows.values() for part in parts))
    colours = {name: COLOURS[3 * i % len(COLOURS)] for i, name in enumerate(names)}
    scale = (WIDTH - _LABEL - 70) / max(sum(parts.values()) for parts in rows.values())
    shapes = []
    for place, (row, parts) in enumerate(rows.items()):
        x, y = float(_LABEL), place * _ROW
        shapes.append(f'<text x="0" y="{y + 15}">{html_text(row[:22])}</text>')
        for name, value in parts.items():
            shapes.append(bar(x, y, value * scale, _ROW - 8, colours[name], f"{name}: {number(value)}"))
            x += value * scale
        shapes.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{number(sum(parts.values()))}</text>')
    return f"<p>{html_text(title)}</p>{svg(shapes, len(rows) * _ROW)}{key(colours)}"
