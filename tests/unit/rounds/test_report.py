"""Charts are compared with hand calculations, and text of models is escaped in the page."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from megatron_post.rounds.accuracy import Accuracy
from megatron_post.rounds.charts import histogram, intervals, lines
from megatron_post.rounds.report import html_table


def test_lines_by_hand() -> None:
    """The lowest value is at the left and bottom (48, 170), the highest at the right and top (410, 10)."""
    text = lines("losses", {"a": [(0, 1.0), (10, 3.0)], "absent": [], "b": [(5, 2.0)]})
    ElementTree.fromstring(text)
    assert re.findall(r'points="([^"]*)"', text) == ["48.0,170.0 410.0,10.0", "229.0,90.0"]
    assert "absent" not in text and lines("empty", {"a": []}) == ""


def test_histogram_by_hand() -> None:
    """With 0, 0, 24 in 24 bins of width 1, the first bin has two thirds. The last bin includes its end."""
    text = histogram("h", {"a": [0.0, 0.0, 24.0]})
    points = [tuple(map(float, p.split(","))) for p in re.findall(r'points="([^"]*)"', text)[0].split()]
    heights = {round(170 - y, 1) for _, y in points}
    assert heights == {0.0, 80.0, 160.0} and len(points) == 50
    assert histogram("h", {"a": [1.0, 1.0]}) and histogram("h", {"a": []}) == ""


def test_intervals_by_hand() -> None:
    """For 0.5 with (0.25, 1.0) the dot is in the middle of 10 to 170, and the line is from 130 to 10."""
    text = intervals("i", {"a": [(1, 0.5, 0.25, 1.0)]})
    ElementTree.fromstring(text)
    assert 'y1="130.0" y2="10.0"' in text and 'cy="90.0"' in text


def test_what_models_write_is_text() -> None:
    table = html_table(["<x>"], [['<script>alert("1")</script> & more']])
    assert "<script" not in table and "&lt;script&gt;" in table


def test_accuracy_by_hand() -> None:
    """For 8 of 10, Wilson's centre is (0.8 + 3.8415 / 20) / 1.38415 = 0.7167, and the half width 0.2267."""
    low, high = Accuracy(8, 10).interval
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert str(Accuracy(8, 10)) == "80.0% (49.0 to 94.3)"
