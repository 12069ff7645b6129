"""`megatron-post score` writes a reward model's scores of responses or of their steps, and can resume."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_post.config.data import Data, Source
from megatron_post.config.schema import Config
from megatron_post.convert.open_model import open_weights_directory
from megatron_post.data.dialog import Dialog
from megatron_post.data.document import Document
from megatron_post.data.row_files import likely_rows
from megatron_post.data.rows import BadRows, read_rows
from megatron_post.data.step_example import Solution, StepExample, split_steps
from megatron_post.data.template import STEP_ROLES, Rendered, render_batch, render_solutions
from megatron_post.data.tokenizer import Tokenizer, tokenizer_of
from megatron_post.display import make_console
from megatron_post.inference.failures import failed_prompts, read_failures
from megatron_post.parallel.topology import Topology
from megatron_post.progress import WorkProgress
from megatron_post.rounds.continued import append_lines, from_reporter, lines_done
from megatron_post.rounds.segments import refuse_interleaved, rows_at_once, values_of_segments
from megatron_post.rounds.trained_model import config_of_model, running_model
from megatron_post.stages.reward import Reward
from megatron_post.stages.step_reward import StepReward
from megatron_post.storage.checksums import sha256_of_file
from megatron_post.train.reference import reference_key
from megatron_post.train.step import Stepper


@dataclass(frozen=True)
class Row:
    """A row of the input, which is one dialog, or one dialog for each response or solution of an example.

    steps: the steps of each dialog's response, if the row has them.
    """

    number: int
    dialogs: tuple[Dialog, ...]
    steps: tuple[tuple[str, ...] | None, ...]


@dataclass(frozen=True)
class Scored:
    """The result of `score_file`.

    rows: the number of rows in the output. written: those that this call has scored. failed_prompts: prompts
    for which `generate` has no response. Their missing responses have no score.
    """

    output: Path
    rows: int
    written: int
    failed_prompts: int


def score_file(
    model: str | Path, rows: str | Path, output: str | Path, overrides: Sequence[str] = ()
) -> Scored:
    """Score the last response of each dialog, or each response of each preference, of a file.

    model: Hugging Face directory of a `LlamaForSequenceClassification`. Writes one JSON line per row,
    `{"row": number, "scores": [...]}`, in the order of the rows. A preference has the score of its best
    response first.

    With a `LlamaForTokenClassification` the steps of responses are scored. A line then has, for each
    response, the probabilities in `steps` that each step is right, and their `min`, `product` and `last`. A
    row's own steps are used, or else `split_steps` splits the response.

    The same call continues after the last complete line. `OUTPUT.origin.json` identifies the
    model and the rows.

    Raises `ValueError` for a model without a reward head, a bad row, a response longer than
    `data.pack_length`, an `output` of another model or other rows, and an interleaved schedule.
    """
    config = _config(model, overrides)
    tokenizer = tokenizer_of(config)
    # Every response is scored, even a templated one. `select` decides which ones may be trained.
    source = Source(name=Path(rows).name, path=str(rows), templated="keep")
    with running_model(config) as (stepper, stage, topology):
        assert isinstance(stage, Reward | StepReward)
        origin = {
            "model": reference_key(model, config.precision, topology),
            "tokenizer": tokenizer.fingerprint,
            "rows": _rows_key(Path(rows)),
        }
        if isinstance(stage, StepReward):
            origin["data.steps.separator"] = config.data.steps.separator
        key = "steps" if isinstance(stage, StepReward) else "scores"
        # Only the reporter reads the output, but all ranks must skip the same rows.
        own = lines_done(Path(output), origin, key=key) if topology.is_reporter else None
        done = from_reporter(own, topology)
        remaining = islice(_rows(source, config.data), done, None)
        scored = 0  # a crash loses at most one batch
        what, console = f"scoring {source.name}", make_console(quiet=not topology.is_reporter)
        total = likely_rows(source)
        with WorkProgress(
            what, total=total, is_estimate=True, done=done, unit="rows", console=console
        ) as progress:
            while batch := list(islice(remaining, rows_at_once(config, topology))):
                scores = _score(batch, stepper, stage, topology, config, tokenizer)
                if topology.is_reporter:
                    pairs = zip(batch, scores, strict=True)
                    append_lines(Path(output), ({"row": row.number, **found} for row, found in pairs))
                scored += len(batch)
                progress.advance(len(batch))
    return Scored(Path(output), done + scored, scored, failed_prompts(read_failures(Path(rows))))


def _config(model: str | Path, overrides: Sequence[str]) -> Config:
    """The config of a reward model that scores. Raises `ValueError` as `score_file` does."""
    # This reads only the headers of the weights, before any rank loads them.
    weights = open_weights_directory(Path(model))
    if not weights.scalar_head:
        raise ValueError(
            f"{model} is a language model without a reward head, and a new head would score at "
            "random; name a model that was trained with stage=reward or stage=step_reward"
        )
    values: dict[str, Any] = {"data": {"store": "unused", "pack_length": 8192}}
    if weights.scores_steps:
        values |= {"stage": "step_reward"}
    else:
        values |= {"stage": "reward", "reward": {"layout": "separate"}}
    config = config_of_model(model, values, overrides)
    refuse_interleaved(config)
    return config


def _score(
    batch: Sequence[Row],
    stepper: Stepper,
    stage: Reward | StepReward,
    topology: Topology,
    config: Config,
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    """The keys of each row of a batch, with one entry for each response."""
    dialogs = [dialog for row in batch for dialog in row.dialogs]
    tensor, context = topology.groups.tp.size(), topology.groups.cp.size()
    shared: dict[str, Any] = {"stepper": stepper, "topology": topology, "config": config}
    shared |= {"pad_id": tokenizer.pad_id, "rows": f"rows {batch[0].number} to {batch[-1].number}"}
    responses = (len(row.dialogs) for row in batch)
    if isinstance(stage, Reward):
        segments = render_batch(dialogs, tokenizer)
        # All tensor- and context-parallel ranks have the same scores.
        flat = values_of_segments(segments, stage.scores, copies=tensor * context, **shared)
        scores = iter(flat.tolist())
        return [{"scores": list(islice(scores, count))} for count in responses]
    segments = _in_steps(batch, config, tokenizer)
    places = [np.flatnonzero(np.isin(segment.roles, STEP_ROLES)) for segment in segments]
    # Each context-parallel rank has the scores of its own tokens only.
    flat = values_of_segments(segments, stage.scores, copies=tensor, places=places, **shared)
    logits = iter(torch.from_numpy(flat).sigmoid().tolist())
    steps = iter([list(islice(logits, len(place))) for place in places])
    return [summary_of_steps(list(islice(steps, count))) for count in responses]


def summary_of_steps(steps: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The step scores of responses, with their smallest, their product and the last one of each response."""
    return {
        "steps": [list(each) for each in steps],
        "min": [min(each) for each in steps],
        "product": [prod(each) for each in steps],
        "last": [each[-1] for each in steps],
    }


def _in_steps(batch: Sequence[Row], config: Config, tokenizer: Tokenizer) -> list[Rendered]:
    """The rendered responses of a batch. The last token of every step has one of `STEP_ROLES`."""
    separator, solutions = config.data.steps.separator, []
    for row in batch:
        for dialog, known in zip(row.dialogs, row.steps, strict=True):
            response = dialog.messages[-1]
            if response.tool_calls:
                raise ValueError(
                    f"row {row.number}: the response calls a tool, and a reward model of steps reads text"
                )
            steps = known or split_steps(response.text, separator)
            # Any label marks the last token of a step.
            solution = Solution(steps, tuple(True for _ in steps))
            solutions.append((dialog.messages[:-1], solution, dialog.tools))
    return render_solutions(solutions, tokenizer, separator=separator)


def _rows(source: Source, data: Data) -> Iterator[Row]:
    rows = read_rows(
        source, bad_rows=BadRows(data.max_bad_rows), reasoning=data.reasoning, neutral=data.steps.neutral
    )
    for number, example in rows:
        if isinstance(example, Dialog):
            yield Row(number, (example,), (None,))
            continue
        assert not isinstance(example, Document)  # only a source that names `text` has documents
        dialogs = tuple(Dialog((*example.prompt, *r), tools=example.tools) for r in example.responses)
        steps: tuple[tuple[str, ...] | None, ...] = tuple(None for _ in dialogs)
        if isinstance(example, StepExample):
            steps = tuple(solution.steps for solution in example.solutions)
        yield Row(number, dialogs, steps)


def _rows_key(rows: Path) -> str:
    """SHA-256 of a file of rows, or the name of a directory or a dataset on the hub."""
    return sha256_of_file(rows) if rows.is_file() else str(rows)
