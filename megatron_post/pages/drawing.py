"""Draws a chart with matplotlib, as SVG that belongs to a page.

Lines and texts have the page's colours, which differ in light and dark. The caption and the legend are HTML,
so that they wrap in a narrow window. A chart is as wide as a window of 500 pixels shows without scaling.
"""

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from megatron_post.display import printable
from megatron_post.pages.page import element, html_of, joined

COLOURS = (
    "#3f7cbf", "#c8791f", "#3f9168", "#c25a50", "#8468c4", "#7d7d7d", "#2a8f9a", "#b8588f", "#85852c",
    "#6fa1d6", "#d9a05f", "#6fb592", "#d98a82", "#a893d8", "#a5a5a5",
)  # fmt: skip
# matplotlib draws with these colours, and the page replaces them by its own
INK, _LINE = "#0000f0", "#0000f1"
_PAGE_COLOURS = {INK: "var(--ink)", _LINE: "var(--line)"}
_WIDTH = 464  # pixels
ROUND = [1, 2, 2.5, 5, 10]  # ticks are at these times a power of ten
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "megatron-post", "text.parse_math": False, "font.size": 11,
    "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": _LINE, "grid.linewidth": 0.6, "lines.linewidth": 1.4,
}  # fmt: skip


def draw_figure(
    title: str,
    draw: Callable[[Axes], None],
    *,
    x: str,
    y: str,
    legend: Sequence[str],
    notes: Iterable[str] = (),
    height: int = 210,
    titles: Mapping[str, str] | None = None,
) -> Markup:
    """A figure with caption, legend, chart and notes.

    draw: draws into the axes. x, y: names of the axes with their units. height: of the chart, in pixels.
    titles: what the parts of the chart show under the pointer, by their ids.
    """
    with mpl.rc_context(_SETTINGS):
        drawing = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
        axes = drawing.add_subplot()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=ROUND))
            axis.set_major_formatter(_Numbers())
        draw(axes)
        # A longer name would be cut. The accessible name of the chart has all of it.
        axes.set(xlabel=shortened(x, 56), ylabel=shortened(y, 26))
        file = io.StringIO()
        drawing.savefig(
            file,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    label = f"{title}. Horizontal axis: {x}." + (f" Vertical axis: {y}." if y else "")
    svg = _inline(file.getvalue(), label=f"{label} Shows {', '.join(legend)}.", titles=titles or {})
    colours = COLOURS * (1 + len(legend) // len(COLOURS))
    swatch = Markup('<i style="background: {}"></i>{}')
    entries = (
        element("li", swatch.format(colour, html_of(name)))
        for name, colour in zip(legend, colours, strict=False)
    )
    key = element("ul", joined(entries), kind="key") if len(legend) > 1 else Markup("")
    notes = joined(element("div", note, kind="faint") for note in notes)
    return element("figure", element("figcaption", title) + key + svg + notes)


def shortened(name: str, most: int) -> str:
    """At most this many characters of a name, as one line of visible text."""
    text = " ".join(printable(name).split())
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _inline(svg: str, *, label: str, titles: Mapping[str, str]) -> Markup:
    """matplotlib's document as an element of a page, with the page's colours and an accessible name."""
    body = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]*)"', body)
    assert view is not None
    body = re.sub(r"<defs>\s*<style.*?</defs>", "", body[body.index(">") + 1 :], count=1, flags=re.DOTALL)
    for colour, own in _PAGE_COLOURS.items():
        body = body.replace(colour, own)
    for name, text in titles.items():
        body = body.replace(f'<g id="{name}">', f"<g><title>{html_of(text)}</title>")
    # A page has several charts, and an id may be there once. Only those that something refers to are kept.
    body = body.replace("xlink:href", "href")
    prefix = hashlib.sha256((label + body).encode()).hexdigest()[:8]
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', body))
    body = re.sub(
        r' id="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", body
    )
    body = re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}-", body)
    start = Markup('<svg role="img" aria-label="{}" viewBox="{}" style="max-width: {}px"><title>{}</title>')
    return start.format(html_of(label), view[1], _WIDTH, html_of(label)) + Markup(body)


class _Numbers(ScalarFormatter):
    """Numbers of an axis. Large ones are short, such as 20k and 1.5M."""

    def __init__(self) -> None:
        super().__init__(useOffset=False)
        self.set_powerlimits((-4, 15))

    def __call__(self, x: float, pos: int | None = None) -> str:
        most = max(map(abs, self.axis.get_view_interval()))  # type: ignore[union-attr]
        for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
            if size <= most < 1e15:
                size = 1e3 if letter == "k" else size
                return f"{x / size:.6g}{letter}" if x else "0"
        return super().__call__(x, pos)
