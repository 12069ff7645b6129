"""Charts are compared with hand calculations, and texts from outside are escaped."""

import math
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from megatron_post.pages.charts import histogram, intervals, lines, spans, stacked
from megatron_post.pages.drawing import COLOURS
from megatron_post.pages.page import document, element, table

HOSTILE = '</title><script>alert("1")</script> & $x_{1}$ \u202e'


def drawn(figure: Markup, colour: str) -> list[list[tuple[float, float]]]:
    """The corners of each path of a colour, in pixels from the left and the top."""
    svg = ElementTree.fromstring(re.findall(r"<svg.*</svg>", figure, re.DOTALL)[0])
    paths = [path for path in svg.iter("path") if colour in path.attrib.get("style", "")]
    return [
        [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.attrib["d"])]
        for path in paths
    ]


def ratio(values: Sequence[float]) -> float:
    """Where the middle one of three values is between the others."""
    return (values[1] - values[0]) / (values[2] - values[0])


def test_a_line() -> None:
    """The values 1, 2 and 4 at 0, 5 and 10: the middle is half across, and a third of the way up."""
    (points,) = (
        p for p in drawn(lines("t", {"a": [(0, 1), (5, 2), (10, 4)]}, x="x", y="y"), COLOURS[0]) if p
    )
    assert ratio([x for x, _ in points]) == pytest.approx(1 / 2, abs=1e-5)
    assert ratio([y for _, y in points]) == pytest.approx(1 / 3, abs=1e-5)
    assert points[0][1] > points[2][1]
    assert lines("t", {"a": []}, x="x", y="y") == "" and lines("t", {}, x="x", y="y") == ""


def test_values_that_are_not_finite_make_gaps_and_are_counted() -> None:
    """The line has two parts of two points. The last point stands alone, so it is a dot."""
    values = [1.0, 2.0, math.nan, 3.0, 2.0, math.inf, 1e300, 5.0]
    figure = lines("t", {"a": list(enumerate(values))}, x="x", y="y")
    assert "3 value(s) are not finite" in figure
    path = next(p for p in re.findall(r'd="(M[^"]*)"[^>]*#3f7cbf', figure) if "L" in p)
    assert path.count("M") >= 2
    only = lines("t", {"a": [(1, math.nan)]}, x="x", y="y")
    assert "1 value(s) are not finite" in only and "<svg" not in only


def test_a_million_points_keep_their_extremes() -> None:
    """One point of 50 among zeros reaches the top of the chart, and the page stays small."""
    points = [(n, 50.0 if n == 654_321 else 0.0) for n in range(1_000_000)]
    figure = lines("t", {"a": points}, x="step", y="y")
    assert "Of every 2,500 points" in figure and len(figure) < 60_000
    heights = [y for path in drawn(figure, COLOURS[0]) for _, y in path]
    assert max(heights) - min(heights) > 100


def test_a_histogram_counts_every_value() -> None:
    """0, 0 and 24 need intervals of 2. Two bars have the heights 2 and 1."""
    (points,) = drawn(histogram("t", {"a": [0.0, 0.0, 24.0, math.nan]}, x="x"), COLOURS[0])
    heights = sorted({round(y, 3) for _, y in points})
    assert len(heights) == 3 and ratio(heights) == pytest.approx(1 / 2, abs=1e-4)
    assert histogram("t", {"a": []}, x="x") == "" and "<svg" in histogram("t", {"a": [1.5, 1.5]}, x="x")
    counted = histogram("t", {"a": {0.0: 2, 24.0: 1}}, x="x")
    assert drawn(counted, COLOURS[0]) == [points]


def test_intervals_have_three_heights() -> None:
    """50% with 25% to 100% on an axis from 0 to 100%: a quarter, a half and the whole of the height."""
    figure = intervals("t", {"a": [(1, 0.5, 0.25, 1.0)]}, x="round", y="accuracy")
    line = next(p for p in drawn(figure, COLOURS[0]) if len(p) == 2 and p[0][0] == p[1][0])
    low, high = line[0][1], line[1][1]
    middle = float(re.findall(r'<use [^>]*y="([\d.]+)" style="fill: #3f7cbf', figure)[-1])
    assert (low - middle) / (low - high) == pytest.approx(1 / 3, abs=1e-4)


def test_parts_of_a_bar_and_boxes_of_a_row() -> None:
    """Parts of 1 and 2, and boxes of 1 and 2 seconds."""
    bars = stacked("t", {"row": {"a": 1.0, "b": 2.0}}, x="s", limit=(4.0, "the limit"))
    (first,), (second,) = drawn(bars, COLOURS[0]), drawn(bars, COLOURS[1])
    assert 2 * (first[1][0] - first[0][0]) == pytest.approx(second[1][0] - second[0][0], abs=1e-4)
    assert "<title>a: 1</title>" in bars and "The dashed line is the limit." in bars
    rows = {"row": {"forward": [(0.0, 1.0)], "backward": [(1.0, 3.0)]}}
    boxes = spans("t", rows, x="s", strengths={"forward": 1.0, "backward": 0.5})
    (first,), (second,) = drawn(boxes, COLOURS[0]), drawn(boxes, COLOURS[1])
    assert 2 * (first[2][0] - first[1][0]) == pytest.approx(second[2][0] - second[1][0], abs=1e-4)


def test_texts_from_outside_are_escaped_and_shown() -> None:
    """In captions, legends, axes, names of rows, titles of bars, tables and the title of the page."""
    charts = [
        lines(HOSTILE, {HOSTILE: [(1, 2)], "_b": [(1, 2)]}, x=HOSTILE, y=HOSTILE),
        stacked(HOSTILE, {HOSTILE: {HOSTILE: 1.0}}, x=HOSTILE),
        histogram(HOSTILE, {HOSTILE: [1]}, x=HOSTILE),
    ]
    page = document(HOSTILE, [*charts, table([HOSTILE], [[HOSTILE]]), element("p", HOSTILE, kind=HOSTILE)])
    assert "<script" not in page and "\u202e" not in page and page.count("</title>") == 5
    assert page.count("$x_{1}$") >= 12 and r"\u202e" in page and "_b</li>" in page
    assert not re.search(r"https?:|(src|href)=.[^#]|url\([^#]", page)


def test_a_page_is_the_same_again() -> None:
    points = {"a": [(1, 2.0), (2, 3.0)]}
    assert lines("t", points, x="x", y="y") == lines("t", points, x="x", y="y")
