"""`megatron-post evaluate choices` measures rank classification, as T0 did.

The choice whose log-probability after the prompt is the highest is the model's answer, see `ranking`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_post.config.data import Source
from megatron_post.config.load import parse
from megatron_post.config.section import Line, Section, Whole
from megatron_post.data.dialog import BadRow
from megatron_post.data.rows import raw_rows
from megatron_post.display import make_console
from megatron_post.progress import WorkProgress
from megatron_post.rounds.continued import append_lines, from_reporter, lines_done
from megatron_post.rounds.ranking import open_ranker
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.files import read_lines, write_json
from megatron_post.storage.reading import reading
from megatron_post.train.reference import reference_key


class Row(Section):
    """A row of the file, as `data prompt` writes it. choices: null for an open question."""

    prompt: str = Field(min_length=1)
    completion: str = Field(min_length=1)
    choices: tuple[str, ...] | None
    dataset: Line
    template: Line
    task: Line | None = None
    row: Whole = 0


@dataclass(frozen=True)
class DatasetReport:
    """The accuracies of a dataset's prompts, their median and quartiles.

    open_rows: rows without choices. A dataset of such rows alone has neither a median nor quartiles.
    """

    dataset: str
    task: str | None
    rows: int
    open_rows: int
    accuracies: dict[str, float]  # by template
    median: float | None
    first_quartile: float | None
    third_quartile: float | None


def evaluate_choices(
    model: str | Path, rows: str | Path, output: str | Path, overrides: Sequence[str] = ()
) -> list[DatasetReport]:
    """Rank the choices of every row of a file, and report each dataset's accuracy over its prompts.

    Writes one JSON line for each row with choices, with the log-probability of every choice, and
    `OUTPUT.report.json` with what is returned. The median and the quartiles are those of the prompts'
    accuracies. The same call continues after the last complete line. `OUTPUT.origin.json` identifies the
    model and the rows. Runs in any layout, and all ranks must call it.

    Raises `ValueError` for a reward model, a row that cannot be used, a row that does not fit in
    `data.pack_length`, an `output` of another model or other rows, and an interleaved schedule.
    """
    found, open_rows = _read(Path(rows))
    with open_ranker(model, overrides) as ranker:
        topology = ranker.topology
        origin = {
            "model": reference_key(model, ranker.config.precision, topology),
            "tokenizer": ranker.tokenizer.fingerprint,
            "rows": sha256_of_json([row.model_dump() for row in found]),
        }
        own = lines_done(Path(output), origin, key="logps") if topology.is_reporter else None
        done = from_reporter(own, topology)
        remaining = islice(found, done, None)
        what, console = f"ranking choices of {rows}", make_console(quiet=not topology.is_reporter)
        with WorkProgress(what, total=len(found), done=done, unit="rows", console=console) as progress:
            while batch := list(islice(remaining, ranker.at_once)):
                first, last = batch[0], batch[-1]
                logps = ranker.rank(
                    [(row.prompt, row.choices or ()) for row in batch],
                    rows=f"row {first.row} of {first.dataset} to row {last.row} of {last.dataset}",
                )
                if topology.is_reporter:
                    append_lines(Path(output), _lines(batch, logps))
                progress.advance(len(batch))
        reports = None
        if topology.is_reporter:
            with reading(output, "log-probabilities of choices"):
                reports = _reports(list(read_lines(Path(output))), open_rows)
            write_json(Path(f"{output}.report.json"), [dataclasses.asdict(each) for each in reports])
        return from_reporter(reports, topology)


def print_report(reports: Sequence[DatasetReport], *, console: Console) -> None:
    """Print one line for each dataset, in percent."""
    table = Table(box=SIMPLE)
    for name in ("dataset", "task"):
        table.add_column(name, overflow="fold")
    for name in ("rows", "prompts", "median", "quartiles", "range of quartiles"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in reports:
        low, median, high = each.first_quartile, each.median, each.third_quartile
        if low is not None and median is not None and high is not None:
            table.add_row(
                each.dataset,
                each.task or "",
                f"{each.rows:,}",
                f"{len(each.accuracies)}",
                f"{100 * median:.1f}",
                f"{100 * low:.1f} to {100 * high:.1f}",
                f"{100 * (high - low):.1f}",
            )
    console.print(table)
    for each in reports:
        if each.open_rows:
            console.print(f"{each.dataset}: {each.open_rows:,} rows without choices were not ranked")


def _read(path: Path) -> tuple[list[Row], dict[str, int]]:
    """The rows with choices, and the number of rows without choices of each dataset. Raises `ValueError`."""
    found: list[Row] = []
    open_rows: dict[str, int] = {}
    for where, row in _rows(path):
        if row.choices is None:
            open_rows[row.dataset] = open_rows.get(row.dataset, 0) + 1
            continue
        choices = [choice.strip() for choice in row.choices]
        if len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices):
            raise ValueError(f"{where}: choices must be two or more different texts, not {choices}")
        if row.completion.strip() not in choices:
            raise ValueError(f"{where}: the completion {row.completion!r:.80} is none of {choices}")
        found.append(row)
    if not found:
        raise ValueError(f"{path} has no row with choices; give answer_choices in the templates")
    return found, open_rows


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    for _, where, row in raw_rows(Source(name=path.name, path=str(path))):
        if isinstance(row, BadRow):
            raise ValueError(f"{where}: {row}")
        yield where, parse(Row, row, origin=where)


def _lines(batch: Sequence[Row], logps: Sequence[Sequence[float]]) -> Iterator[dict[str, Any]]:
    for row, own in zip(batch, logps, strict=True):
        choices = [choice.strip() for choice in row.choices or ()]
        yield {
            "dataset": row.dataset,
            "task": row.task,
            "template": row.template,
            "row": row.row,
            "logps": list(own),
            "answer": choices.index(row.completion.strip()),
            "predicted": int(np.argmax(own)),
        }


def _reports(lines: Sequence[dict[str, Any]], open_rows: dict[str, int]) -> list[DatasetReport]:
    """The report of each dataset, in the order of their names."""
    reports = []
    for dataset in sorted({line["dataset"] for line in lines} | open_rows.keys()):
        own = [line for line in lines if line["dataset"] == dataset]
        right: dict[str, list[bool]] = {}
        for line in own:
            right.setdefault(line["template"], []).append(line["predicted"] == line["answer"])
        accuracies = {template: float(np.mean(values)) for template, values in right.items()}
        quartiles = np.percentile(list(accuracies.values()), (25, 50, 75)).tolist() if own else [None] * 3
        reports.append(
            DatasetReport(
                dataset=dataset,
                task=own[0]["task"] if own else None,
                rows=len(own),
                open_rows=open_rows.get(dataset, 0),
                accuracies=accuracies,
                first_quartile=quartiles[0],
                median=quartiles[1],
                third_quartile=quartiles[2],
            )
        )
    return reports
