"""Runs the demo with several seeds, to measure how much its result varies."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_post.demo.run import RESULTS, Sizes, run_demo
from megatron_post.pages.charts import intervals
from megatron_post.pages.page import document, table
from megatron_post.rounds.accuracy import Accuracy
from megatron_post.storage.files import write_whole

# The 97.5% quantile of Student's t, by degrees of freedom from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_MEASURES = {"greedy": "greedy", "one_sample": "one sample", "best_of_k": "best of K"}


@dataclass(frozen=True)
class Spread:
    """The same figure with several seeds, as shares."""

    values: tuple[float, ...]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval of the mean, by Student's t."""
        half = _T[len(self.values) - 2] * stdev(self.values) / math.sqrt(len(self.values))
        return mean(self.values) - half, mean(self.values) + half

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        each = ", ".join(f"{100 * value:.1f}" for value in self.values)
        return f"{100 * mean(self.values):.1f}  ({low:.1f} to {high:.1f}; {each})"

    def __sub__(self, other: "Spread") -> "Spread":
        """The difference seed by seed."""
        return Spread(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))


def run_seeds(
    config_path: str, overrides: Sequence[str], *, run_dir: str, seeds: int, sizes: Sizes, console: Console
) -> None:
    """Run the demo with seeds 0, 1, ..., each in a directory of its own, and compare the results.

    The seed sets data, weights and samples. The comparison is a table, and `seeds.html` in `run_dir`. Raises
    as `run_demo` does.
    """
    directories = [Path(run_dir, f"seed-{seed}") for seed in range(seeds)]
    for seed, directory in enumerate(directories):
        console.rule(f"seed {seed}")
        run_demo(
            config_path, [*overrides, f"run_dir={directory}", f"seed={seed}"], sizes=sizes, console=console
        )
    compare([json.loads((path / RESULTS).read_text()) for path in directories], Path(run_dir), console)


def compare(results: Sequence[dict[str, Any]], directory: Path, console: Console) -> None:
    """Print a summary of `results.json` of several seeds, and write `seeds.html`."""
    steps = {"untrained": [r["before"] for r in results], "after SFT": [r["sft"] for r in results]}
    greedy = {name: _spread(found) for name, found in steps.items()}
    rows = [(f"{name}, greedy", str(spread)) for name, spread in greedy.items()]
    gains = []
    series: dict[str, list[tuple[float, float, float, float]]] = {label: [] for label in _MEASURES.values()}
    series["greedy"].append(_point(0, greedy["after SFT"]))
    before = greedy["after SFT"]
    for number in range(1, len(results[0]["rounds"]) + 1):
        found = {key: _spread([r["rounds"][number - 1][key] for r in results]) for key in _MEASURES}
        for key, label in _MEASURES.items():
            rows.append((f"round {number}, {label}", str(found[key])))
            series[label].append(_point(number, found[key]))
        gains.append((f"round {number} over the one before, greedy", str(found["greedy"] - before)))
        gain = found["best_of_k"] - found["one_sample"]
        gains.append((f"round {number}: best of K over one sample", str(gain)))
        before = found["greedy"]
    title = f"exact match, mean of {len(results)} seeds (95% by Student's t; each seed)"
    console.print(_terminal_table(title, ("", "%"), rows))
    console.print(_terminal_table("gains, paired by seed", ("", "points"), gains))
    chart = "Exact match on held-out problems, by round; 0 is after SFT"
    parts = [
        table((title, "%"), rows),
        table(("gains, paired by seed", "points"), gains),
        intervals(chart, series, x="round", y="exact match"),
    ]
    page = document(f"The demo with {len(results)} seeds", parts)
    write_whole(directory / "seeds.html", page)
    console.print(f"{directory / 'seeds.html'} is the report.", soft_wrap=True)


def _spread(found: Sequence[dict[str, int]]) -> Spread:
    return Spread(tuple(Accuracy(**values).share for values in found))


def _point(x: float, spread: Spread) -> tuple[float, float, float, float]:
    low, high = spread.interval
    return x, mean(spread.values), max(0.0, low), min(1.0, high)


def _terminal_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, title=title)
    for name in head:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
