"""The resume matrix. Every key of the schema is changed on a resume, and is refused, applied or accepted."""

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from megatron_post.config.identity import kind_of
from megatron_post.config.schema import Config
from megatron_post.config.settings import flatten, schema_keys
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.checkpoint import Position
from megatron_post.train.parts import build_trainer
from megatron_post.train.resume import Found, Resuming
from tests.ranks import run_ranks
from tests.tiny import tiny_config

CONTENT = {
    "data.store": "a" * 64,
    "model.init_from": None,
    "adapter.init_from": None,
    "tokenizer.path": "c" * 64,
}


def _config(run_dir: Path, stage: str) -> Config:
    sources = [{"name": "rows", "path": "rows.jsonl"}]
    held_out = [{"name": "held out", "path": "other.jsonl"}]
    prompted = {"sources": [{"source": "rows", "templates": "templates.yaml", "task": "sums"}]}
    values: dict[str, Any] = {
        "data": {"sources": sources, "eval_sources": held_out, "prompted": prompted if stage == "sft" else {}}
    }
    values["tracking"] = {"wandb": {"project": "p"}, "mlflow": {"uri": "u", "experiment": "e"}}
    return tiny_config(run_dir, stage=stage, model={"num_layers": 1}, adapter={"rank": 4}, **values)


def _literals(annotation: Any) -> list[Any]:
    found = get_args(annotation)
    return [value for inner in found for value in (_literals(inner) if get_args(inner) else [inner])]


def _another(value: Any, annotation: Any) -> Any:
    """Some other value in JSON's types. The outcome of a resume must not depend on the choice."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list | dict):
        return ["other"] if isinstance(value, list) else {"prompt": "other"}
    others = [x for x in _literals(annotation) if isinstance(x, str) and x != value]
    return others[0] if others else f"{value}-other"


def _with(section: BaseModel, path: list[str], value: Any) -> Any:
    """A copy of a section with another value for one key."""
    name, rest = path[0], path[1:]
    inner = getattr(section, name)
    if rest and isinstance(inner, tuple):
        number = int(rest[0])
        value = (*inner[:number], _with(inner[number], rest[1:], value), *inner[number + 1 :])
    elif rest:
        value = _with(inner, rest, value)
    return section.model_copy(update={name: value})


def _result_or_message(find: Any) -> Found | str:
    try:
        return find()
    except ValueError as error:
        return str(error)


def _resumed_with_each_change(
    config: Config,
) -> dict[str, tuple[str, str, str | None, tuple[tuple[str, str, str], ...]]]:
    """For each key: its values before and after as text, the refusal, and the applied changes."""
    outcomes = {}
    with parallel_run(config.parallel, seed=1) as topology:
        trainer, _ = build_trainer(config, topology, content=CONTENT)
        trainer.save(Position(2, 8))
        trainer.checkpoints.wait()
        own = trainer.checkpoints._resuming
        for key, before in flatten(config).items():
            pattern = key.replace(".0.", ".*.")
            changed = _with(config, key.split("."), _another(before, schema_keys()[pattern].annotation))
            content = CONTENT | ({key: "b" * 64} if key in CONTENT else {})
            resuming = Resuming(changed, topology, own.root, own.run, content)
            found = _result_or_message(resuming.find)
            texts = (own.settings.text(key), resuming.settings.text(key))
            if isinstance(found, str):
                outcomes[key] = (*texts, found, ())
            else:
                applied = tuple((c.key, c.before, c.after) for c in found.changes)
                outcomes[key] = (*texts, None, applied)
    return outcomes


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_every_key_is_refused_applied_or_accepted(tmp_path: Path, stage: str) -> None:
    config = _config(tmp_path / "run", stage)
    (outcomes,) = run_ranks(_resumed_with_each_change, 1, config)
    keys = {key for key in schema_keys() if stage == "sft" or not key.startswith("data.prompted.sources.")}
    assert {key.replace(".0.", ".*.") for key in outcomes} == keys
    counts: Counter[str | None] = Counter()
    for key, (before, after, refused, applied) in outcomes.items():
        assert before != after
        changed = flatten(config) | ({"stage": "other"} if key == "stage" else {})
        kind = kind_of(key.replace(".0.", ".*."), changed)
        counts[kind] += 1
        if kind == "identity":
            assert refused is not None and f"{key}: {before} there, {after} here" in refused, key
            assert refused.count(" there, ") == 1 and "restore these values" in refused
        else:
            expected = ((key, before, after),) if kind == "free" else ()
            assert (refused, applied) == (None, expected), key
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in ("identity", "free", "harmless"))
    print(f"resume matrix, {stage}: {len(outcomes)} keys, {summary}")
    assert min(counts[kind] for kind in ("identity", "free", "harmless")) >= 6
