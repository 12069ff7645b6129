"""Prints a record as a table in the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_post.bench.record import Figure, Record


def print_record(record: Record, console: Console) -> None:
    """Print the settings, each figure's median and percentiles 10 and 90, and the notes."""
    console.print(f"bench {record.benchmark}: {record.subject}", style="bold", highlight=False)
    for name, value in record.settings.items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    table = Table("", box=SIMPLE)
    for name in ("median", "p10", "p90", "n", "unit"):
        table.add_column(name, justify="left" if name == "unit" else "right")
    for name, figure in record.figures.items():
        values = (figure.median, figure.quantile(0.1), figure.quantile(0.9))
        alone = len(figure.samples) == 1
        shown = [number(v) for v in values[: 1 if alone else 3]] + ["", ""] * alone
        table.add_row(name, *shown, str(len(figure.samples)), figure.unit)
    console.print(table)
    if record.text:
        console.print(record.text, highlight=False, soft_wrap=True)
    for note in record.notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)


def titled(title: str, columns: Sequence[str]) -> Table:
    """An empty table of numbers. The first column has their names."""
    table = Table(
        box=SIMPLE, pad_edge=False, collapse_padding=True, title=title, title_justify="left", title_style=""
    )
    for i, name in enumerate(columns):
        table.add_column(name, no_wrap=True, justify="right" if i else "left")
    return table


def number(value: float) -> str:
    """Four significant digits, or all digits before the point."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def median_and_interval(figure: Figure) -> str:
    """Text such as 12.3 (12.1 to 12.6)."""
    if len(figure.samples) == 1:
        return number(figure.median)
    low, high = figure.interval
    return f"{number(figure.median)} ({number(low)} to {number(high)})"
