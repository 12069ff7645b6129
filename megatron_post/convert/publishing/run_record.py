"""The training record of a run, and the documents of its exports.

A run writes `run_dir/origin` when it starts: the record with its own step, and the base model's legal files.
So an export needs neither the base model nor the data again, which may be gone by then.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_post.config.schema import Config
from megatron_post.convert.publishing.card import documents
from megatron_post.convert.publishing.legal import legal_files
from megatron_post.convert.publishing.record import (
    RECORD,
    DataShare,
    Record,
    Step,
    read_record,
    record_of_base,
)
from megatron_post.storage.files import whole_file
from megatron_post.storage.hub import model_directory
from megatron_post.storage.manifest import step_directory

ORIGIN = "origin"
# sections whose settings a card lists; of the sections of losses, only that of the stage
_SECTIONS = ("optimizer", "loss")
_OF_STAGE = ("reward", "dpo", "pretrain")
# what a line of metrics has besides figures of the model
_OTHER = (
    *("step", "kind", "time", "seconds", "tokens", "tokens_per_second", "saves_stalled_seconds"),
    *("memory_gib", "tflops_per_gpu", "mfu", "lr", "loss_outlier", "grad_norm_outlier"),
)


def write_origin(config: Config, data: Sequence[DataShare]) -> None:
    """Write `run_dir/origin`, in place of that of an earlier run. data: the sources of the run."""
    base = _base(config)
    record = Record() if base is None else record_of_base(base)
    record = record.model_copy(update={"steps": (*record.steps, _step(config, data, {}))})
    files = ({} if base is None else legal_files(model_directory(base))) | {RECORD: record.text()}
    directory = Path(config.run_dir) / ORIGIN
    shutil.rmtree(directory, ignore_errors=True)
    for name, content in files.items():  # the record is the last
        with whole_file(directory / name) as growing:
            growing.write_bytes(content)


def run_documents(
    config: Config, run_dir: Path, step: int, companions: Mapping[str, bytes]
) -> dict[str, bytes]:
    """The documents of an export of a run after a step, by name.

    run_dir: where the run is now. Settings are those of `config`, because some may change over restarts.
    companions: config and tokenizer of the export.
    """
    directory = run_dir / ORIGIN
    record, legal = read_record(directory), legal_files(directory)
    if record is None or not record.steps:  # a run of an earlier version
        data = [DataShare(name=source.name) for source in config.data.sources]
        record = Record(steps=(_step(config, data, {}),))
    own = _step(config, record.steps[-1].data, _figures(run_dir / "metrics.jsonl", step))
    own = own.model_copy(update={"settings": {**own.settings, "train.steps": step}})
    record = record.model_copy(update={"steps": (*record.steps[:-1], own)})
    return documents(record, legal, companions)


def _base(config: Config) -> str | Path | None:
    """The model that a run starts from: an adapter, weights, or converted weights as step 0 of the run."""
    if config.adapter is not None and config.adapter.init_from is not None:
        adapter = Path(config.adapter.init_from)
        if read_record(adapter) is not None:
            return adapter
    if config.model.init_from is not None:
        return config.model.init_from
    first = step_directory(Path(config.run_dir) / "checkpoints", 0)
    return first if first.is_dir() else None


def _step(config: Config, data: Sequence[DataShare], figures: dict[str, float]) -> Step:
    values = config.model_dump(mode="json")
    settings = {
        "seed": config.seed,
        "train.steps": config.train.steps,
        "train.global_batch": config.train.global_batch,
        "data.pack_length": config.data.pack_length,
    }
    for section in (*_SECTIONS, *(name for name in _OF_STAGE if name == config.stage)):
        settings |= _flat(section, values[section])
    if values["adapter"] is not None:
        settings |= _flat("adapter", {k: v for k, v in values["adapter"].items() if k != "init_from"})
    return Step(name=config.stage, settings=settings, data=tuple(data), figures=figures)


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a section by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(f"{prefix}.{key}", value) if isinstance(value, dict) else {f"{prefix}.{key}": value}
    return found


def _figures(path: Path, step: int) -> dict[str, float]:
    """The figures of a step and of the last evaluation before its end. Empty if there are no metrics."""
    last: dict[str, dict[str, Any]] = {}
    for text in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a kill leaves half a line
            line = json.loads(text)
            if line["step"] <= step:
                last[line["kind"]] = line
    found = {}
    for kind, title in (("train", "training"), ("eval", "held out")):
        for key, value in last.get(kind, {}).items():
            if key not in _OTHER and _is_finite(value):
                found[f"{title}: {key}"] = float(value)
    return found


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
