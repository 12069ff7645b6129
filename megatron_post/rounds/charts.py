"""Draws small charts as SVG text, for a page without scripts and other files."""

from collections.abc import Sequence
from itertools import pairwise

from megatron_post.display import html_text

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 420, 200, 48, 30
_COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea")
_BINS = 24


def lines(title: str, series: dict[str, Sequence[tuple[float, float]]]) -> str:
    """A line chart. Series without points are left out."""
    filled = {name: points for name, points in series.items() if points}
    if not filled:
        return ""
    every = [point for points in filled.values() for point in points]
    frame = _Frame([x for x, _ in every], [y for _, y in every])
    drawn = [
        f'<polyline fill="none" stroke="{colour}" points="'
        + " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        + '"/>'
        for colour, points in zip(_COLOURS, filled.values(), strict=False)
    ]
    return frame.page(title, drawn, list(filled))


def histogram(title: str, series: dict[str, Sequence[float]]) -> str:
    """A histogram with equal bins. Each series is an outline of its shares."""
    filled = {name: values for name, values in series.items() if values}
    if not filled:
        return ""
    every = [value for values in filled.values() for value in values]
    low, high = min(every), max(every)
    width = (high - low) / _BINS or 1.0
    steps: dict[str, Sequence[tuple[float, float]]] = {}
    for name, values in filled.items():
        counts = [0] * _BINS
        for value in values:
            counts[min(_BINS - 1, int((value - low) / width))] += 1
        edges = [low + i * width for i in range(_BINS + 1)]
        points = [(edges[0], 0.0)]
        for (start, end), count in zip(pairwise(edges), counts, strict=True):
            points += [(start, count / len(values)), (end, count / len(values))]
        steps[name] = [*points, (edges[-1], 0.0)]
    return lines(title, steps)


def intervals(title: str, series: dict[str, Sequence[tuple[float, float, float, float]]]) -> str:
    """A chart of values with intervals. Each point is (x, value, low, high)."""
    every = [point for points in series.values() for point in points]
    if not every:
        return ""
    xs = [x for x, *_ in every]
    frame = _Frame([min(xs) - 0.5, max(xs) + 0.5], [0.0, 1.0], marks=sorted(set(xs)))
    drawn = []
    for number, (colour, points) in enumerate(zip(_COLOURS, series.values(), strict=False)):
        for x, value, low, high in points:
            at = frame.x(x) + 7 * (number - len(series) / 2)
            drawn += [
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}" '
                f'stroke="{colour}"/>',
                f'<circle cx="{at:.1f}" cy="{frame.y(value):.1f}" r="3" fill="{colour}"/>',
            ]
    return frame.page(title, drawn, list(series))


class _Frame:
    """Axes over the ranges of some values."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], *, marks: Sequence[float] = ()) -> None:
        """marks: the values that are written below the axis, by default its two ends."""
        self._x, self._y = _range(xs), _range(ys)
        self._marks = marks or self._x

    def x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - 10)

    def y(self, value: float) -> float:
        low, high = self._y
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _BOTTOM - 10)

    def page(self, title: str, drawn: Sequence[str], names: Sequence[str]) -> str:
        """A figure with caption and legend."""
        base, right = _HEIGHT - _BOTTOM, _WIDTH - 10
        axes = f'<path d="M{_LEFT} 10V{base}H{right}" fill="none" stroke="#888"/>'
        # A centred number at the right end would be cut off.
        anchors = {self._x[1]: "end"}
        labels = "".join(
            f'<text x="{self.x(v):.0f}" y="{base + 16}" '
            f'text-anchor="{anchors.get(v, "middle")}">{v:.4g}</text>'
            for v in self._marks
        ) + "".join(
            f'<text x="{_LEFT - 5}" y="{self.y(v) + 4:.0f}" text-anchor="end">{v:.4g}</text>' for v in self._y
        )
        legend = " ".join(
            f'<span style="color:{colour}">&#9632; {html_text(name)}</span>'
            for colour, name in zip(_COLOURS, names, strict=False)
        )
        svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{axes}{labels}{"".join(drawn)}</svg>'
        return f"<figure><figcaption>{html_text(title)}<br/>{legend}</figcaption>{svg}</figure>"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
