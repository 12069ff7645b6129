"""`megatron-post score` writes a reward model's scores of responses, row by row, and can resume."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_post.config.data import Data, Source
from megatron_post.config.schema import Config
from megatron_post.convert.open_model import open_weights_directory
from megatron_post.data.dialog import Dialog, Preference
from megatron_post.data.rows import BadRows, read_rows
from megatron_post.data.template import render
from megatron_post.data.tokenizer import Tokenizer, tokenizer_of
from megatron_post.display import make_console, make_progress
from megatron_post.parallel.topology import Topology
from megatron_post.rounds.continued import append_lines, from_reporter, lines_done
from megatron_post.rounds.segments import refuse_interleaved, rows_at_once, values_of_segments
from megatron_post.rounds.trained_model import config_of_model, running_model
from megatron_post.stages.reward import Reward
from megatron_post.storage.checksums import sha256_of_file
from megatron_post.train.reference import reference_key
from megatron_post.train.step import Stepper


@dataclass(frozen=True)
class Row:
    """A row of the input, which is one dialog, or one dialog for each response of a preference."""

    number: int
    dialogs: tuple[Dialog, ...]


def score_file(model: str | Path, rows: str | Path, output: str | Path, overrides: Sequence[str] = ()) -> int:
    """Score the last response of each dialog, or each response of each preference, of a file.

    model: Hugging Face directory of a `LlamaForSequenceClassification`. Writes one JSON line per row,
    `{"row": number, "scores": [...]}`, in the order of the rows. A preference has the score of its best
    response first. The same call continues after the last complete line. `OUTPUT.origin.json` identifies the
    model and the rows. Returns the number of rows that this call has scored.

    Raises `ValueError` for a model without a reward head, a bad row, a response longer than
    `data.pack_length`, an `output` of another model or other rows, and an interleaved schedule.
    """
    config = _config(model, overrides)
    tokenizer = tokenizer_of(config)
    # Every response is scored, even a templated one. `select` decides which ones may be trained.
    source = Source(name=Path(rows).name, path=str(rows), templated="keep")
    with running_model(config) as (stepper, stage, topology):
        assert isinstance(stage, Reward)
        origin = {
            "model": reference_key(model, config.precision, topology),
            "tokenizer": tokenizer.fingerprint,
            "rows": _rows_key(Path(rows)),
        }
        # Only the reporter reads the output, but all ranks must skip the same rows.
        own = lines_done(Path(output), origin, key="scores") if topology.is_reporter else None
        done = from_reporter(own, topology)
        remaining = islice(_rows(source, config.data), done, None)
        scored = 0  # a crash loses at most one batch
        with make_progress(make_console(quiet=not topology.is_reporter)) as progress:
            task = progress.add_task(f"scoring {source.name}", total=None)
            while batch := list(islice(remaining, rows_at_once(config, topology))):
                scores = _score(batch, stepper, stage, topology, config, tokenizer)
                if topology.is_reporter:
                    pairs = zip(batch, scores, strict=True)
                    append_lines(Path(output), ({"row": row.number, "scores": s} for row, s in pairs))
                scored += len(batch)
                progress.update(task, completed=done + scored)
    return scored


def _config(model: str | Path, overrides: Sequence[str]) -> Config:
    """The config of a reward model that scores. Raises `ValueError` as `score_file` does."""
    values = {
        "stage": "reward",
        "reward": {"layout": "separate"},
        "data": {"store": "unused", "pack_length": 8192},
    }
    config = config_of_model(model, values, overrides)
    refuse_interleaved(config)
    # This reads only the headers of the weights, before any rank loads them.
    if not open_weights_directory(Path(model)).scalar_head:
        raise ValueError(
            f"{model} is a language model without a reward head, and a new head would score at "
            "random; name a model that was trained with stage=reward"
        )
    return config


def _score(
    batch: Sequence[Row],
    stepper: Stepper,
    stage: Reward,
    topology: Topology,
    config: Config,
    tokenizer: Tokenizer,
) -> list[list[float]]:
    rendered = [[render(dialog, tokenizer) for dialog in row.dialogs] for row in batch]
    flat = values_of_segments(
        [segment for segments in rendered for segment in segments],
        stage.scores,
        # All tensor- and context-parallel ranks have the same scores.
        copies=topology.groups.tp.size() * topology.groups.cp.size(),
        rows=f"rows {batch[0].number} to {batch[-1].number}",
        stepper=stepper,
        topology=topology,
        config=config,
        pad_id=tokenizer.pad_id,
    )
    scores = iter(flat.tolist())
    return [[next(scores) for _ in segments] for segments in rendered]


def _rows(source: Source, data: Data) -> Iterator[Row]:
    rows = read_rows(source, bad_rows=BadRows(data.max_bad_rows), reasoning=data.reasoning)
    for number, example in rows:
        if isinstance(example, Preference):
            responses = example.responses
            dialogs = tuple(Dialog((*example.prompt, *r), tools=example.tools) for r in responses)
            yield Row(number, dialogs)
        else:
            yield Row(number, (example,))


def _rows_key(rows: Path) -> str:
    """SHA-256 of a file of rows, or the name of a directory or a dataset on the hub."""
    return sha256_of_file(rows) if rows.is_file() else str(rows)
