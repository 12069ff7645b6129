"""A run resumes from its own newest intact checkpoint. It passes over copies and steps of other runs."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from rich.console import Console

from megatron_post.config.schema import Config
from megatron_post.data.build import build_store
from megatron_post.data.store_format import COLUMNS, GROUPS, GroupName, SourceCounts
from megatron_post.data.store_metadata import read_settings
from megatron_post.data.store_writer import StoreWriter
from megatron_post.data.template import TokenRole
from megatron_post.parallel.topology import parallel_run
from megatron_post.storage import manifest
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.train import resume
from megatron_post.train.checkpoint import Position
from megatron_post.train.fence import claim
from megatron_post.train.parts import build_trainer
from megatron_post.train.run import train
from tests.e2e.runs import small_run
from tests.ranks import run_ranks
from tests.tiny import tiny_config

ONE_LAYER: dict[str, Any] = {"model": {"num_layers": 1}}


def _save(config: Config, *steps: int) -> tuple[int, str]:
    """Start a run, and save it as if it were at some steps.

    Returns the step that it started from, and what it printed about checkpoints.
    """
    printed: list[str] = []
    with (
        mock.patch.object(resume, "say", printed.append),
        parallel_run(config.parallel, seed=1) as topology,
    ):
        trainer, start = build_trainer(config, topology)
        for step in steps:
            trainer.save(Position(step, 4 * step))
            trainer.checkpoints.wait()
    return start.step, "\n".join(printed)


def _start(config: Config, *steps: int, ranks: int = 1) -> tuple[int, str]:
    return run_ranks(_save, ranks, config, *steps)[0]


def _config(directory: Path, name: str, **sections: Any) -> Config:
    values = {**ONE_LAYER, "train": {"steps": 100}, "checkpoint": {"keep": 2}, **sections}
    return tiny_config(directory / name, **values)


def _root(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def _copy(source: Config, step: int, target: Config, number: int | None = None) -> Path:
    copy = manifest.step_directory(_root(target), step if number is None else number)
    shutil.copytree(manifest.step_directory(_root(source), step), copy)
    return copy


def test_a_copy_under_another_number_is_passed_over(tmp_path: Path) -> None:
    """Otherwise every start would resume from step 8 and call it step 20."""
    config = _config(tmp_path, "run")
    _start(config, 6, 8)
    copy = _copy(config, 8, config, 20)
    step, output = _start(config, 10, 12, ranks=2)
    assert step == 8 and "checkpoint of step 20 is damaged and passed over" in output
    assert "it is of step 8, so the directory has been copied or renamed" in output
    assert manifest.published_steps(_root(config)) == [10, 12, 20]
    assert _start(config, 20)[0] == 12
    assert manifest.read_manifest(copy)["step"] == 20  # the run itself has reached step 20
    assert _start(config) == (20, "")


def test_a_step_of_another_run_is_passed_over_and_not_deleted(tmp_path: Path) -> None:
    """The other run has the same config and data. Its steps lie between and after the run's own steps.

    They do not count towards the number of checkpoints that are kept.
    """
    config, other = _config(tmp_path, "run"), _config(tmp_path, "other")
    _start(config, 6, 8)
    _start(other, 7, 30)
    for step in (7, 30):
        _copy(other, step, config)
    # The run's own newest step is damaged. It must not be replaced by the other run's step.
    (manifest.step_directory(_root(config), 8) / "common.pt").write_bytes(b"")
    step, output = _start(config, 9)
    assert step == 6
    for text in ("30 is of another run", "8 is damaged", "7 is of another run"):
        assert f"checkpoint of step {text} and passed over" in output
    assert manifest.published_steps(_root(config)) == [6, 7, 8, 9, 30]
    step, output = _start(config, 31, 32)
    assert step == 9 and "checkpoint of step 7" not in output
    assert manifest.published_steps(_root(config)) == [7, 30, 31, 32]


def test_a_directory_with_steps_of_other_runs_only_is_an_error(tmp_path: Path) -> None:
    config, other = _config(tmp_path, "run"), _config(tmp_path, "other")
    claim(config.run_dir, "1.0")
    _start(other, 7)
    _copy(other, 7, config)
    with pytest.raises(
        AssertionError, match="no intact checkpoint of this run: that of step 7 is of another"
    ):
        _start(config)


def test_moved_checkpoints_keep_the_id_of_their_run(tmp_path: Path) -> None:
    """They are copied to an empty run directory with a step of another run. `latest` decides the id."""
    config, other, moved = (_config(tmp_path, name) for name in ("run", "other", "moved"))
    _start(config, 6, 8)
    _start(other, 30)
    shutil.copytree(_root(config), _root(moved))
    _copy(other, 30, moved)
    assert _start(moved, 10)[0] == 8
    first, second = (claim(c.run_dir, "next").run for c in (config, moved))
    assert first == second != claim(other.run_dir, "next").run
    alone = _config(tmp_path, "alone")
    _copy(other, 30, alone)  # a single step without `latest`
    assert _start(alone) == (30, "")


def test_all_incarnations_share_the_id_of_their_run(tmp_path: Path) -> None:
    runs = {claim(tmp_path / "run", name).run for name in ("1.0", "1.1", "2.0")}
    assert len(runs) == 1
    (tmp_path / "run" / "incarnations" / "000003").write_text("{")  # its process died while it wrote this
    assert claim(tmp_path / "run", "3.0").run in runs
    assert claim(tmp_path / "other", "1.0").run not in runs


def test_a_run_cannot_end_before_its_checkpoint(tmp_path: Path) -> None:
    """Otherwise it would end at once with status 0 and no message.

    It may end at the checkpoint's own step.
    """
    _start(_config(tmp_path, "run"), 8)
    assert _start(_config(tmp_path, "run", train={"steps": 8})) == (8, "")
    with pytest.raises(AssertionError, match=r"train.steps=7 is below step 8, where the run stands"):
        _start(_config(tmp_path, "run", train={"steps": 7}))


def _sign(directory: Path, state: object) -> None:
    """Put another state into a manifest, with a checksum that fits."""
    content = manifest.read_manifest(directory) | {"state": state}
    signed = {"sha256": sha256_of_json(content), **content}
    (directory / manifest.MANIFEST).write_text(json.dumps(signed))


JUNK: list[Any] = [
    {"run": 7},
    {"settings": "none"},
    {"content": {"data.store": 7}},
    {"consumed_packs": -4},
    {"consumed_packs": "8"},
    {"world_size": None},
    {"weights_only": "yes"},
]


def test_a_manifest_with_an_invalid_state_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    config = _config(tmp_path, "run")
    _start(config, 6, 8)
    directory = manifest.step_directory(_root(config), 8)
    good = manifest.read_manifest(directory)["state"]
    for state in [*(good | junk for junk in JUNK), None, [], "state"]:
        _sign(directory, state)
        step, output = _start(config)
        assert step == 6 and "checkpoint of step 8 is damaged and passed over" in output, state
        assert "manifest.json: state" in output and "pydantic" not in output


def _as_earlier_versions(directory: Path) -> None:
    """Rewrite a manifest as earlier versions wrote it. They stored the settings only in config.yaml."""
    state = manifest.read_manifest(directory)["state"]
    _sign(directory, {k: v for k, v in state.items() if k not in ("run", "settings", "content")})


def test_a_checkpoint_of_an_earlier_version_is_compared_by_its_config_file(tmp_path: Path) -> None:
    config = _config(tmp_path, "run")
    _start(config, 8)
    _as_earlier_versions(manifest.step_directory(_root(config), 8))
    with pytest.raises(AssertionError, match=r"model.rope_theta: 1000.0 there, 2000.0 here"):
        _start(_config(tmp_path, "run", model={"num_layers": 1, "rope_theta": 2000.0}))
    assert _start(config) == (8, "")


def _run(config: Config) -> None:
    train(config)


def _changed(config: Config, **sections: dict[str, Any]) -> Config:
    """A copy of a config with other values in some sections."""
    updates = {name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()}
    return config.model_copy(update=updates)


def test_data_is_identified_by_its_content(tmp_path: Path) -> None:
    """A moved store is the same data. A store that was packed from other rows at the same path is not."""
    config = small_run(tmp_path, model={"num_layers": 1}, train={"steps": 2, "export_hf": False})
    run_ranks(_run, 1, config)
    longer = _changed(config, train={"steps": 4})
    moved = tmp_path / "elsewhere"
    shutil.copytree(config.data.store, moved)
    run_ranks(_run, 1, _changed(longer, data={"store": str(moved)}))
    (line,) = (Path(config.run_dir) / "changes.jsonl").read_text().splitlines()
    assert json.loads(line)["changes"] == {"train.steps": ["2", "4"]} and json.loads(line)["step"] == 2

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    build_store(config, console=Console(quiet=True), overwrite=True)
    with pytest.raises(AssertionError, match=r"data.store: .*elsewhere \(content \w{12}\) there, .*store \("):
        run_ranks(_run, 1, longer)


def test_a_store_holds_the_sources_that_the_config_names(tmp_path: Path) -> None:
    config = small_run(tmp_path, model={"num_layers": 1}, train={"steps": 2, "export_hf": False})
    (source,) = config.data.sources
    other = source.model_copy(update={"name": "other"})
    for data, message in (
        ({"sources": (source, other)}, r"data.sources names other, which store .*/train does not hold"),
        ({"sources": (other,)}, r"data.sources names other, which store"),
        (
            {"eval_sources": (other,)},
            r"data.eval_sources names other, which .*/eval does not hold \(.*nothing",
        ),
    ):
        with pytest.raises(AssertionError, match=message):
            run_ranks(_run, 1, _changed(config, data=data))
    two = config.model_copy(update={"data": config.data.model_copy(update={"sources": (source, other)})})
    build_store(two, console=Console(quiet=True), overwrite=True)
    with pytest.raises(AssertionError, match=r"/train holds other, which data.sources does not name"):
        run_ranks(_run, 1, config)
    run_ranks(_run, 1, _changed(config, data={"sources": ()}))  # without names, any store is accepted


def _write_masked(path: str, config: Config, groups: Sequence[GroupName]) -> None:
    """Write a store with one pack in each group. In `groups` every token of the pack is masked."""
    length = config.data.pack_length
    settings = read_settings(config.data.store)
    columns = {key: [0] for key in COLUMNS} | {"padded": [length], "length": [length], "rank": [-1]}
    with StoreWriter(path, settings) as writer:
        for group in GROUPS:
            role = TokenRole.PROMPT if group in groups else TokenRole.BODY
            pack = (np.ones(length, np.int32), np.full(length, role, np.uint8))
            sources = [SourceCounts("sums" if group == "train" else "held out", rows=1)]
            writer.write(group, sources=sources, columns=columns, segments_per_pack=[1], packs=[pack])


@pytest.mark.parametrize(("group", "what"), [("train", "train"), ("eval", "evaluate")])
def test_a_run_without_trained_tokens_is_an_error(tmp_path: Path, group: GroupName, what: str) -> None:
    """No token is trained, or none is evaluated. Otherwise the run would take its steps and learn nothing."""
    config = small_run(tmp_path, model={"num_layers": 1}, train={"steps": 2, "export_hf": False})
    held_out = config.data.sources[0].model_copy(update={"name": "held out"})
    for masked, name in (([], "good"), ([group], "masked")):
        store = str(tmp_path / name)
        _write_masked(store, config, masked)
        data = {"store": store, "eval_sources": (held_out,)}
        changed = _changed(config, data=data, train={"global_batch": 2})
        if not masked:
            run_ranks(_run, 1, changed)
            continue
        message = (
            rf"/{group} has no token with loss.trained_roles=\[body,terminator\] in any of its 1 packs, "
        )
        with pytest.raises(AssertionError, match=f"{message}so there is nothing to {what}"):
            run_ranks(_run, 2, changed)
