"""`megatron-post evaluate choices` measures rank classification, as T0 did.

The choice whose log-probability after the prompt is the highest is the model's answer. As in T0, the
log-probability is the sum over the choice's tokens, without normalisation by length. The end of the message
is one of them, as the end of the text is in T0, so that a choice can be the beginning of another one.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_post.config.data import Source
from megatron_post.config.load import parse
from megatron_post.config.schema import Config
from megatron_post.config.section import Line, Section, Whole
from megatron_post.convert.open_model import open_weights_directory
from megatron_post.data.batch import PackedBatch
from megatron_post.data.dialog import BadRow, Dialog, Message
from megatron_post.data.rows import raw_rows
from megatron_post.data.template import render
from megatron_post.data.tokenizer import tokenizer_of
from megatron_post.display import make_console, make_progress
from megatron_post.rounds.continued import append_lines, from_reporter, lines_done
from megatron_post.rounds.segments import refuse_interleaved, rows_at_once, values_of_segments
from megatron_post.rounds.trained_model import config_of_model, running_model
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
    config = _config(model, overrides)
    tokenizer = tokenizer_of(config)
    found, open_rows = _read(Path(rows))
    with running_model(config) as (stepper, _, topology):
        origin = {
            "model": reference_key(model, config.precision, topology),
            "tokenizer": tokenizer.fingerprint,
            "rows": sha256_of_json([row.model_dump() for row in found]),
        }
        own = lines_done(Path(output), origin, key="logps") if topology.is_reporter else None
        done = from_reporter(own, topology)
        remaining = islice(found, done, None)
        with make_progress(make_console(quiet=not topology.is_reporter)) as progress:
            task = progress.add_task(f"ranking choices of {rows}", total=len(found), completed=done)
            while batch := list(islice(remaining, rows_at_once(config, topology))):
                first, last = batch[0], batch[-1]
                dialogs = [_dialog(row, choice) for row in batch for choice in row.choices or ()]
                values = values_of_segments(
                    [render(dialog, tokenizer) for dialog in dialogs],
                    _sums,
                    copies=topology.groups.tp.size(),  # context-parallel ranks have a part of each sum
                    rows=f"row {first.row} of {first.dataset} to row {last.row} of {last.dataset}",
                    stepper=stepper,
                    topology=topology,
                    config=config,
                    pad_id=tokenizer.pad_id,
                )
                if topology.is_reporter:
                    append_lines(Path(output), _lines(batch, values.tolist()))
                progress.advance(task, len(batch))
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


def _config(model: str | Path, overrides: Sequence[str]) -> Config:
    values = {"stage": "sft", "data": {"store": "unused", "pack_length": 8192}}
    config = config_of_model(model, values, overrides)
    refuse_interleaved(config)
    if open_weights_directory(Path(model)).scalar_head:
        raise ValueError(f"{model} is a reward model, which gives no probabilities; name a language model")
    return config


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


def _dialog(row: Row, choice: str) -> Dialog:
    return Dialog((Message("user", row.prompt.strip()), Message("assistant", choice.strip())))


def _sums(logps: Tensor, batch: PackedBatch) -> Tensor:
    """The sum of the trained labels' log-probabilities of each segment on this rank, float64 [n].

    logps: fp32 [t / cp], of each token's label.
    """
    trained = torch.where(batch.trained, logps, torch.zeros_like(logps)).double()
    return trained.new_zeros(len(batch.lengths)).index_add(0, batch.segments, trained)


def _lines(batch: Sequence[Row], values: Sequence[float]) -> Iterator[dict[str, Any]]:
    remaining = iter(values)
    for row in batch:
        choices = [choice.strip() for choice in row.choices or ()]
        logps = list(islice(remaining, len(choices)))
        yield {
            "dataset": row.dataset,
            "task": row.task,
            "template": row.template,
            "row": row.row,
            "logps": logps,
            "answer": choices.index(row.completion.strip()),
            "predicted": int(np.argmax(logps)),
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
