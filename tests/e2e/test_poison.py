"""No byte of a checkpoint is ever run, whoever wrote and signed the checkpoint.

Each test replaces one thing after another by pickles that would touch a file. It signs what an attacker can
sign, and runs every command that reads the result. All commands run in this process, where a start takes a
tenth of a second.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.utils import unwrap_model

from megatron_post.config.load import load_config
from megatron_post.parallel.topology import parallel_run
from megatron_post.storage import manifest
from megatron_post.train.loading import METADATA
from megatron_post.train.parts import build_trainer
from tests.e2e.poison import (
    Call,
    Case,
    check,
    entries,
    poisons,
    replace_entry,
    run_on_poison,
    saved,
    sign,
    succeed,
)
from tests.e2e.runs import small_run
from tests.ranks import run_ranks

# Checkpoints that this program saved asynchronously, that `convert` made from its export, and that
# megatron-core's `dist_checkpointing.save` saved.
STEPS = {"trained": 2, "converted": 0, "megatron-core": 2}
READERS = ("train", "inspect", "verify", "megatron-to-hf", "merge")
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its export in `hf`, and its weights in a checkpoint of each kind."""
    directory = tmp_path_factory.mktemp("poison")
    small_run(directory, model={"num_layers": 1}, train={"steps": 2, "global_batch": 2, "export_hf": True})
    run_ranks(_make_checkpoints, 1, directory)
    return directory


def _step(directory: Path, kind: str) -> Path:
    return manifest.step_directory(directory / kind / "checkpoints", STEPS[kind])


def _make_checkpoints(directory: Path) -> None:
    succeed("train", directory / "config.yaml", f"run_dir={directory / 'trained'}")
    (directory / "trained" / "hf").rename(directory / "hf")
    succeed("convert", "hf-to-megatron", directory / "hf", directory / "converted" / "checkpoints")
    step = _step(directory, "megatron-core")
    shutil.copytree(_step(directory, "trained"), step)
    config = load_config(directory / "config.yaml", [f"run_dir={directory / 'megatron-core'}"])
    with parallel_run(config.parallel, seed=1) as topology:
        trainer, _ = build_trainer(config, topology)
        model_state = unwrap_model(trainer.chunks)[0].sharded_state_dict(metadata=METADATA)
        adam = trainer.optimizer.sharded_state_dict({"model": model_state}, metadata=METADATA)
        for path in [*step.glob("*.distcp"), step / ".metadata", step / "common.pt", step / "metadata.json"]:
            path.unlink()
        kept = {path.name: path.read_bytes() for path in step.iterdir()}
        shutil.rmtree(step)
        step.mkdir()
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        dist_checkpointing.save({**model_state, "optimizer": adam}, str(step), strategy)
    for name, content in kept.items():
        (step / name).write_bytes(content)
    sign(step, [path.name for path in step.iterdir() if path.name != manifest.MANIFEST])


def _commands(base: Path, run: Path, step: Path, work: Path) -> dict[str, tuple[object, ...]]:
    """Every command that reads a checkpoint. work: the directory in which it may write."""
    models = [{"model": str(step)}, {"model": str(base / "hf")}]
    (work / "merge.yaml").write_text(yaml.safe_dump({"models": models}))
    return {
        "train": ("train", base / "config.yaml", f"run_dir={run}"),
        "inspect": ("convert", "inspect", step),
        "verify": ("convert", "verify", step, base / "hf"),
        "megatron-to-hf": ("convert", "megatron-to-hf", step, work / "back"),
        "merge": ("merge", "linear", "--config", work / "merge.yaml", "--output", work / "merged"),
    }


def _walk(
    base: Path, directory: Path, kind: str, changes: Mapping[str, Change], readers: Sequence[str] = READERS
) -> list[Case]:
    """Run each reader on a fresh copy with each change of a checkpoint."""
    found = []
    for what, change in changes.items():
        for reader in readers:
            work = directory / "work"
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(base / kind, work / kind)
            step = _step(work, kind)
            change(step)
            arguments = _commands(base, work / kind, step, work)[reader]
            found.append(run_on_poison(what, reader, arguments, directory / "witness"))
    return found


@pytest.mark.parametrize("kind", STEPS)
def test_unchanged_every_command_reads_it(base: Path, tmp_path: Path, kind: str) -> None:
    (cases,) = run_ranks(_walk, 1, base, tmp_path, kind, {"nothing": _as_it_is})
    assert [case.status for case in cases] == [0] * len(READERS), cases


def _as_it_is(step: Path) -> None:
    """No change."""


@pytest.mark.parametrize("kind", ["trained", "megatron-core"])
def test_every_object_of_a_checkpoint(base: Path, tmp_path: Path, kind: str) -> None:
    """Each object is replaced by a pickle that calls a function, and one object by each form of pickle."""
    forms = poisons(tmp_path / "witness")
    objects = [index for index, is_object in entries(_step(base, kind)).items() if is_object]
    assert len(objects) >= 4
    tried = [(index, "os.system") for index in objects] + [(objects[0], form) for form in forms]
    changes = {
        f"{index.fqn} {form}": partial(replace_entry, index=index, content=forms[form])
        for index, form in tried
    }
    (cases,) = run_ranks(_walk, 1, base, tmp_path, kind, changes)
    assert len(cases) == len(changes) * len(READERS)
    for case in cases:
        check(case, named=f".distcp: {case.what.split(' ')[0]}: not ")


@pytest.mark.slow
@pytest.mark.parametrize("kind", STEPS)
def test_every_tensor_of_a_checkpoint(base: Path, tmp_path: Path, kind: str) -> None:
    """Each archive of a tensor is replaced by one that holds an object.

    Conversion does not read Adam's state, and `inspect` reads no values.
    """
    poison = saved(Call(Path.touch, tmp_path / "witness"))
    changes = {
        f"{index.fqn} {number}": partial(replace_entry, index=index, content=poison)
        for number, (index, is_object) in enumerate(entries(_step(base, kind)).items())
        if not is_object
    }
    adam = {what: change for what, change in changes.items() if what.startswith("optimizer.")}
    weights = {what: change for what, change in changes.items() if what not in adam}
    assert len(weights) >= 9
    cases = [
        *run_ranks(_walk, 1, base, tmp_path, kind, weights, [r for r in READERS if r != "inspect"])[0],
        *run_ranks(_walk, 1, base, tmp_path, kind, adam, ["train"])[0],
    ]
    for case in cases:
        check(case, named=".distcp: not a file of plain tensors")


# The files that each command reads besides the data. Conversion copies some other files without reading them.
DECISIVE = {
    "train": ("manifest.json", ".metadata", "common.pt", "generators-0.safetensors"),
    "others": ("manifest.json", ".metadata", "config.yaml"),
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("form", ["a plain pickle", "the object alone", "an old archive"])
def test_every_file_of_a_checkpoint(base: Path, tmp_path: Path, kind: str, form: str) -> None:
    poison = poisons(tmp_path / "witness")[form]
    names = [path.name for path in _step(base, kind).iterdir() if path.suffix != ".distcp"]
    changes = {name: partial(_replace_file, name=name, content=poison) for name in names}
    (cases,) = run_ranks(_walk, 1, base, tmp_path, kind, changes)
    assert len(cases) == len(names) * len(READERS)
    for case in cases:
        if case.what == "config.json":
            check(case, named=case.what)
        elif case.what in DECISIVE["train" if case.reader == "train" else "others"]:
            unread = kind == "converted" and case.what == "common.pt" and case.reader != "train"
            check(case, named=None if unread else case.what)
        else:
            assert not case.ran and "Traceback" not in case.output, case


def _replace_file(step: Path, *, name: str, content: bytes) -> None:
    (step / name).write_bytes(content)
    if name != manifest.MANIFEST:
        sign(step)
