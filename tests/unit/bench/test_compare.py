"""Verdicts on figures, differences between runs, and the page."""

import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree

from megatron_post.bench.compare import compare, differences, groups, summary
from megatron_post.bench.page import page
from megatron_post.bench.record import Figure, Record, once


def _run(
    seconds: list[float],
    *,
    date: str = "2026-11-21T06:00:00+00:00",
    subject: str = "sft, a.yaml",
    torch: str = "2.13",
) -> Record:
    figures = {
        "step": Figure("s", tuple(seconds), "lower"),
        "tokens/s/rank": Figure("1/s", tuple(100 / s for s in seconds), "higher"),
        "trained tokens/s/rank": Figure("1/s", tuple(40 / s for s in seconds), "higher"),
        "padded tokens/s/rank": Figure("1/s", tuple(110 / s for s in seconds), "higher"),
        "phase: data": Figure("s", tuple(s / 4 for s in seconds), "lower"),
        "phase: <rest>": Figure("s", tuple(3 * s / 4 for s in seconds), "lower"),
        "memory": once("GiB", seconds[0], "lower"),
    }
    environment = {"date": date, "torch": torch, "load": str(seconds[0])}
    return Record(
        "step", subject, {"ranks": "1"}, figures, environment, ("<b>a note</b>",), text="as printed"
    )


SLOW, FAST = [2.0, 2.1, 2.2, 2.3, 2.4, 2.5], [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]


def test_verdicts() -> None:
    """The medians 2.25 and 1.25 s have intervals 2.0 to 2.5 and 1.0 to 1.5. 2.4 to 2.6 touches the first."""
    faster = compare(_run(SLOW), _run(FAST))
    assert str(faster["step"]) == "-44.4%: better" and faster["tokens/s/rank"].kind == "better"
    assert compare(_run(FAST), _run(SLOW))["step"].kind == "worse"
    assert compare(_run(SLOW), _run([2.4, 2.45, 2.5, 2.55, 2.6]))["step"].kind == "no change seen"
    assert str(faster["memory"]) == "-50.0%: measured once"


def test_differences_leave_out_what_always_differs() -> None:
    assert differences(_run(SLOW, date="then"), _run(FAST, torch="2.14")) == ["torch: 2.13 -> 2.14"]


def test_groups_and_summary() -> None:
    runs = [_run(SLOW), _run(SLOW, subject="dpo, a.yaml"), _run(FAST), _run(FAST, subject="dpo, a.yaml")]
    assert [len(group) for group in groups(runs)] == [2, 2]
    (line,) = summary([runs[0], runs[2]])
    assert line.startswith("step (sft, a.yaml), 2 runs: step -44.4%: better; tokens/s/rank +")
    assert "memory" not in line and summary(runs[:2]) == [] and "settings" not in line
    other = dataclasses.replace(runs[2], settings={"ranks": "2"})
    assert summary([runs[0], other])[0].endswith(" (other settings: ranks: 1 -> 2)")


def test_page(tmp_path: Path) -> None:
    """The page is self-contained and escaped, with two charts and bars of 1 s and 2 s."""
    text = page([_run(SLOW), _run(FAST, date="2026-11-22T06:00:00+00:00")])
    assert not re.search(r"https?://|src=|<script|<link", text)
    assert "&lt;b&gt;a note&lt;/b&gt;" in text and "<b>a note" not in text
    assert (
        '<span class="better">-44.4%: better</span>' in text and '<pre class="wide">as printed</pre>' in text
    )
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    found = re.findall(
        r"<title>(?:data|&lt;rest&gt;): .*?</title>.*?M ([\d.]+) .*?L ([\d.]+) ", drawings[2], re.DOTALL
    )
    widths = [float(right) - float(left) for left, right in found]
    assert len(widths) == 4
    assert abs((widths[0] + widths[1]) / (widths[2] + widths[3]) - 2.25 / 1.25) < 1e-3
    assert page([_run([1.0])]).count("<svg") == 2
