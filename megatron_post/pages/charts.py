"""The kinds of charts on pages. Each is an HTML figure, or nothing without anything to draw."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from megatron_post.pages.drawing import COLOURS, INK, ROUND, draw_figure, shortened
from megatron_post.pages.page import element

Points = Sequence[tuple[float, float]]
_BINS, _DRAWN_POINTS = 20, 800
_MOST = 1e100  # matplotlib's arithmetic on larger values overflows


def lines(title: str, series: Mapping[str, Points | np.ndarray], *, x: str, y: str) -> Markup:
    """A line chart, or empty markup if there are no points.

    series: points [n, 2] by name. x, y: the names of the axes.

    A value that is not finite makes a gap, and the note counts it. Of many points, the smallest and largest
    of each part of the axis are drawn.
    """
    arrays = {name: np.asarray(points, dtype=np.float64).reshape(-1, 2) for name, points in series.items()}
    arrays = {name: points for name, points in arrays.items() if len(points)}
    if not arrays:
        return Markup("")
    notes = []
    if undrawn := sum(int((~_drawable(points[:, 1])).sum()) for points in arrays.values()):
        notes.append(f"{undrawn:,} value(s) are not finite or above {_MOST:g}, and are not drawn.")
    if (most := max(map(len, arrays.values()))) > _DRAWN_POINTS:
        part = -(-most // (_DRAWN_POINTS // 2))
        notes.append(f"Of every {part:,} points, the smallest and the largest are drawn.")

    every = np.concatenate(list(arrays.values()))
    if not _drawable(every[:, 1]).any():
        return element("figure", element("figcaption", title) + element("div", notes[0], kind="faint"))

    def draw(axes: Axes) -> None:
        _whole_ticks(axes, every[:, 0])
        for points, colour in zip(arrays.values(), COLOURS, strict=False):
            drawn = _thinned(points)
            good = np.concatenate([[False], np.isfinite(drawn[:, 1]), [False]])
            # A line through one point is invisible.
            alone = good[1:-1] & ~good[:-2] & ~good[2:]
            axes.plot(drawn[:, 0], drawn[:, 1], color=colour)
            axes.plot(drawn[alone, 0], drawn[alone, 1], "o", color=colour, markersize=4)

    return draw_figure(title, draw, x=x, y=y, legend=list(arrays), notes=notes)


def _drawable(values: np.ndarray) -> np.ndarray:
    return np.isfinite(values) & (np.abs(values) <= _MOST)


def _thinned(points: np.ndarray) -> np.ndarray:
    """points: [n, 2] -> [at most 800, 2]. What cannot be drawn becomes NaN."""
    points = np.column_stack([points[:, 0], np.where(_drawable(points[:, 1]), points[:, 1], np.nan)])
    if len(points) <= _DRAWN_POINTS:
        return points
    kept: list[int] = []
    edges = np.linspace(0, len(points), _DRAWN_POINTS // 2 + 1).astype(int)
    for start, end in pairwise(edges):
        part = points[start:end, 1]
        found = np.flatnonzero(np.isfinite(part))
        low, high = (found[np.argmin(part[found])], found[np.argmax(part[found])]) if len(found) else (0, 0)
        kept += sorted({start + int(low), start + int(high)})
    return points[kept]


def histogram(title: str, series: Mapping[str, Sequence[float] | Mapping[float, int]], *, x: str) -> Markup:
    """A histogram with round intervals, or nothing without values.

    series: values, or how often each value comes, by name. One series shows counts, several show shares.
    """
    counted = {name: _counted(values) for name, values in series.items()}
    counted = {name: pair for name, pair in counted.items() if len(pair[0])}
    if not counted:
        return Markup("")
    every = np.concatenate([values for values, _ in counted.values()])
    edges = _edges(every)
    is_share = len(counted) > 1

    def draw(axes: Axes) -> None:
        _whole_ticks(axes, every)
        for number, (values, counts) in enumerate(counted.values()):
            heights = np.histogram(
                values, edges, weights=counts / counts.sum() * 100 if is_share else counts
            )[0]
            axes.stairs(heights, edges, color=COLOURS[number], fill=not is_share, linewidth=1.4, baseline=0)
        axes.set_ylim(bottom=0)
        if not is_share:
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))

    return draw_figure(title, draw, x=x, y="share, %" if is_share else "number", legend=list(counted))


def _counted(values: Sequence[float] | Mapping[float, int]) -> tuple[np.ndarray, np.ndarray]:
    """Values that can be drawn, and how often each comes."""
    if isinstance(values, Mapping):
        found, counts = np.array(list(values), float), np.array(list(values.values()), float)
    else:
        found, counts = np.asarray(values, float), np.ones(len(values))
    return found[_drawable(found)], counts[_drawable(found)]


def _edges(values: np.ndarray) -> np.ndarray:
    """Ends of at most about 20 equal intervals. Those of width 1 are centred on a whole number."""
    low, high = float(values.min()), float(values.max())
    is_whole = bool((values == np.round(values)).all())
    if is_whole and high - low < _BINS:
        return np.arange(low, high + 2) - 0.5
    if low == high:
        low, high = low - 0.5 * max(1.0, abs(low)), high + 0.5 * max(1.0, abs(high))
    edges = np.array(MaxNLocator(_BINS, steps=[1, 2, 5, 10], integer=is_whole).tick_values(low, high))
    first = max(0, int(np.searchsorted(edges, low, "right")) - 1)
    return edges[first : int(np.searchsorted(edges, high, "right")) + 1]


def intervals(
    title: str, series: Mapping[str, Sequence[tuple[float, float, float, float]]], *, x: str, y: str
) -> Markup:
    """Values with intervals, or nothing without any. Each point is (x, value, low, high), shares from 0 to 1.

    x is a whole number.
    """
    filled = {name: np.array(points) for name, points in series.items() if points}
    if not filled:
        return Markup("")

    def draw(axes: Axes) -> None:
        for number, points in enumerate(filled.values()):
            places = points[:, 0] + 0.08 * (number - (len(filled) - 1) / 2)
            low, value, high = 100 * points[:, 2], 100 * points[:, 1], 100 * points[:, 3]
            axes.errorbar(
                places, value, [np.maximum(0, value - low), np.maximum(0, high - value)], fmt="o-",
                color=COLOURS[number], markersize=4, capsize=3, linewidth=1,
            )  # fmt: skip
        every = np.concatenate([points[:, 0] for points in filled.values()])
        axes.set_ylim(0, 100)
        axes.set_xlim(every.min() - 0.5, every.max() + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    return draw_figure(title, draw, x=x, y=f"{y}, %", legend=list(filled))


def stacked(
    title: str, rows: Mapping[str, Mapping[str, float]], *, x: str, limit: tuple[float, str] | None = None
) -> Markup:
    """A bar for each row, divided into parts, or nothing without any. The total is at the end of a bar.

    limit: value and meaning of a dashed line.
    """
    filled = {name: parts for name, parts in rows.items() if parts}
    if not filled:
        return Markup("")
    names = list(dict.fromkeys(part for parts in filled.values() for part in parts))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    titles: dict[str, str] = {}

    def draw(axes: Axes) -> None:
        for place, parts in enumerate(filled.values()):
            start = 0.0
            for number, (name, value) in enumerate(parts.items()):
                (bar,) = axes.barh(place, value, 0.7, left=start, color=colours[name])
                bar.set_gid(f"bar-{place}-{number}")
                titles[f"bar-{place}-{number}"] = f"{name}: {value:.4g}"
                start += value
            axes.text(
                1.01, place, f"{start:.4g}", transform=axes.get_yaxis_transform(), verticalalignment="center"
            )
        if limit is not None:
            axes.axvline(limit[0], color=INK, linestyle="--", linewidth=1.2)
        _name_rows(axes, list(filled))

    notes = [f"The dashed line is {limit[1]}."] if limit else []
    height = 70 + 26 * len(filled)
    return draw_figure(title, draw, x=x, y="", legend=names, height=height, titles=titles, notes=notes)


def spans(
    title: str,
    rows: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    x: str,
    strengths: Mapping[str, float],
) -> Markup:
    """A row of boxes over time for each name. rows: (start, end) of boxes, by the name of their colour.

    strengths: opacity of each of these names, from 0 to 1, whose colour is that of its first word.
    """
    words = list(dict.fromkeys(name.split(",")[0] for name in strengths))

    def draw(axes: Axes) -> None:
        for place, groups in enumerate(rows.values()):
            for name, boxes in groups.items():
                ends = np.array(boxes)
                corners = np.empty((len(boxes), 5, 2))
                corners[:, :, 0] = ends[:, [0, 0, 1, 1, 0]]
                corners[:, :, 1] = place + 0.38 * np.array([-1, 1, 1, -1, -1])
                codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(boxes)
                colour = COLOURS[words.index(name.split(",")[0])]
                path = Path(corners.reshape(-1, 2), codes)
                axes.add_patch(PathPatch(path, facecolor=colour, edgecolor="none", alpha=strengths[name]))
        axes.autoscale_view()
        axes.set_xlim(left=0)
        _name_rows(axes, list(rows))

    return draw_figure(title, draw, x=x, y="", legend=words, height=70 + 22 * len(rows))


def _whole_ticks(axes: Axes, values: np.ndarray) -> None:
    """Ticks only at whole numbers if all values are whole."""
    is_whole = bool((values % 1 == 0).all())
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND, integer=is_whole, min_n_ticks=1))


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """The first row is at the top. A long name is cut, since it is in the text of the page too."""
    axes.set_yticks(range(len(names)), [shortened(name, 22) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
