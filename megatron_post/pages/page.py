"""Renders pages from the one template, and the elements that they share.

Every text is escaped and its invisible characters are shown, because people and models wrote some of it.
Only `Markup`, which is made here and in `charts`, is taken as HTML.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from megatron_post.display import printable

_HERE = Path(__file__).parent


def render(template: Path, **values: Any) -> str:
    """A page from a template that extends `base.html.j2`.

    values: what the template needs, `title` among them. A missing one is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _HERE]),
        autoescape=True,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(
        count=lambda number: f"{number:,}",
        share=lambda part, whole: f"{part / whole:.1%}" if whole else "0%",
        width=lambda part, whole: f"{100 * part / whole if whole else 0:.2f}%",
    )
    return environment.get_template(template.name).render(values)


def document(title: str, parts: Iterable[Markup]) -> str:
    """A page whose body is a sequence of elements."""
    return render(_HERE / "base.html.j2", title=title, parts=list(parts))


def element(name: str, content: object, *, kind: str = "") -> Markup:
    """One HTML element. content: a text, or `Markup`. kind: its class."""
    return Markup("<{0}{1}>{2}</{0}>").format(
        Markup(name), Markup(' class="{}"').format(html_of(kind)) if kind else "", html_of(content)
    )


def joined(parts: Iterable[object]) -> Markup:
    """Texts and elements, one after the other."""
    return Markup("").join(html_of(part) for part in parts)


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: bool = False) -> Markup:
    """A table that scrolls in its own box if it is too wide.

    numbers: whether all columns but the first are aligned to the right.
    """
    kinds = ["text", *(["n" if numbers else "text"] * (len(head) - 1))]
    lines = [joined(element("th", cell, kind=kind) for cell, kind in zip(head, kinds, strict=True))]
    lines += [
        joined(element("td", cell, kind=kind) for cell, kind in zip(row, kinds, strict=True)) for row in rows
    ]
    return element("div", element("table", joined(element("tr", line) for line in lines)), kind="wide")


def cards(figures: Mapping[str, object]) -> Markup:
    """Boxes with a name and a figure each."""
    boxes = (
        element("div", element("b", value) + html_of(name), kind="card") for name, value in figures.items()
    )
    return element("div", joined(boxes), kind="cards")


def bullets(items: Iterable[object]) -> Markup:
    """A list, or nothing if there are no items."""
    lines = joined(element("li", item) for item in items)
    return element("ul", lines) if lines else lines


def figures(charts: Iterable[Markup]) -> Markup:
    """Charts beside each other where the window is wide."""
    return element("div", joined(charts), kind="figures")


def html_of(content: object) -> Markup:
    """`printable(content)` with HTML's special characters escaped. `Markup` stays as it is."""
    return escape(_visible(content))


def _visible(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
