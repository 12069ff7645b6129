"""Runs with adapters as a user starts them: kills, other layouts, other bases, and the way out and back."""

import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from megatron_post.config.load import to_yaml
from megatron_post.data.build import build_store
from megatron_post.demo.adapter import largest_difference
from megatron_post.storage import manifest
from megatron_post.train.run import train
from tests.e2e import test_pretrain, test_step_reward
from tests.e2e.runs import kill_9, small_run, start
from tests.e2e.test_preferences import _config, _rows
from tests.ranks import run_ranks
from tests.unit.convert.models import weights_of, write_hf

pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
ADAPTER = {"rank": 4, "alpha": 8.0, "dropout": 0.1}


def _prepared(directory: Path, **sections: object) -> None:
    """A packed store, a base model, and a config whose adapter stands beside it."""
    config = small_run(directory, **sections)
    write_hf(directory / "base", config.model, weights_of(config.model))
    model = config.model.model_copy(update={"init_from": str(directory / "base")})
    (directory / "config.yaml").write_text(to_yaml(config.model_copy(update={"model": model})))


def _run(directory: Path, name: str, *overrides: str, ranks: int = 1, status: int = 0) -> str:
    log = directory / f"{name}.log"
    command = ["train", str(directory / "config.yaml"), f"run_dir={directory / name}", *overrides]
    assert start(command, ranks=ranks, log=log).wait(timeout=240) == status, log.read_text()
    return log.read_text()


def _adapter(directory: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(directory / name / "adapter" / "adapter_model.safetensors")


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_kill_9_and_another_layout(tmp_path: Path) -> None:
    """A killed run ends with the same adapter bit for bit. Under PP 2 it is equal up to rounding in Adam."""
    _prepared(tmp_path, adapter=ADAPTER, parallel={"tensor": 2}, checkpoint={"every": 2, "keep": 9})
    _run(tmp_path, "whole", ranks=2)
    expected = _adapter(tmp_path, "whole")
    log = tmp_path / "killed.log"
    command = ["train", str(tmp_path / "config.yaml"), f"run_dir={tmp_path / 'killed'}"]
    process, deadline = start(command, ranks=2, log=log), time.monotonic() + 120
    while "step 5/8" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    kill_9(process)
    assert re.search(r"resumed after step [24]", _run(tmp_path, "killed", ranks=2))
    assert _equal(_adapter(tmp_path, "killed"), expected)

    root = tmp_path / "moved" / "checkpoints"
    root.mkdir(parents=True)
    source = manifest.step_directory(tmp_path / "whole" / "checkpoints", 4)
    source.rename(root / source.name)
    log_text = _run(tmp_path, "moved", "parallel.tensor=1", "parallel.pipeline=2", ranks=2)
    assert "resumed after step 4" in log_text
    moved = _adapter(tmp_path, "moved")
    for name, value in expected.items():
        assert (value - moved[name]).norm() <= 1e-4 * value.norm(), name


def test_export_import_and_another_base(tmp_path: Path) -> None:
    """`peft` computes the merged model's logits. An imported adapter leaves as it came.

    A run refuses to resume beside another base, and to start from an adapter of other settings.
    """
    _prepared(tmp_path, adapter={**ADAPTER, "kind": "dora", "dropout": 0.0}, train={"steps": 2})
    _run(tmp_path, "run")
    change, error = largest_difference(tmp_path / "base", tmp_path / "run")
    assert change > 1e-3 and error < 1e-4
    start_from = f"adapter.init_from={tmp_path / 'run' / 'adapter'}"
    _run(tmp_path, "again", start_from, "optimizer.lr=1e-30", "train.steps=1")
    assert _equal(_adapter(tmp_path, "again"), _adapter(tmp_path, "run"))
    assert "adapter.rank: 3 in the config, 4 there" in _run(
        tmp_path, "other", start_from, "adapter.rank=3", status=2
    )

    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "model.init_from" in _run(tmp_path, "run", "train.steps=4", status=2)
    log, run = tmp_path / "convert.log", tmp_path / "run"
    command = ["convert", "megatron-to-hf", str(run / "checkpoints"), str(tmp_path / "converted")]
    assert start(command, ranks=1, log=log).wait(timeout=120) == 2
    assert "holds an adapter and not a model" in log.read_text()


def test_reward_head_is_saved(tmp_path: Path) -> None:
    """PEFT loads the head of a reward model from `modules_to_save`."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    _rows(tmp_path)
    config = _config(tmp_path, "reward", train={"steps": 2}, adapter={"rank": 4})
    write_hf(tmp_path / "base", config.model, weights_of(config.model))
    model = config.model.model_copy(update={"init_from": str(tmp_path / "base")})
    config = config.model_copy(update={"model": model})
    build_store(config, console=Console(quiet=True))
    run_ranks(train, 1, config)
    run = tmp_path / "run-reward"
    adapted = AutoPeftModelForSequenceClassification.from_pretrained(run / "adapter", num_labels=1)
    merged = AutoModelForSequenceClassification.from_pretrained(run / "hf")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, atol=1e-4, rtol=1e-4)


CONFIGS = {"step_reward": test_step_reward._config, "pretrain": test_pretrain._config}


@pytest.mark.parametrize(("stage", "kind"), [("step_reward", "lora"), ("pretrain", "dora")])
def test_steps_and_documents(tmp_path: Path, stage: str, kind: str) -> None:
    """A resumed run writes the same adapter, and one in another layout an equal one.

    PEFT computes the logits of the merged weights. A run that starts from the adapter, whose directory also
    has a head, writes it unchanged.
    """
    import peft
    import transformers

    adapter: dict[str, Any] = {"kind": kind, "rank": 4}
    base = CONFIGS[stage](tmp_path)
    write_hf(tmp_path / "base", base.model, weights_of(base.model))
    model = base.model.model_dump() | {"init_from": str(tmp_path / "base")}

    def run(name: str, ranks: int = 1, **sections: Any) -> dict[str, torch.Tensor]:
        schedule = {"train": {"steps": 4}, "checkpoint": {"every": 2, "keep": 9}}
        values: dict[str, Any] = {"model": model, "adapter": adapter} | schedule | sections
        config = CONFIGS[stage](tmp_path, name, **values)
        if not (tmp_path / "store").exists():
            build_store(config, console=Console(quiet=True))
        run_ranks(train, ranks, config)
        return _adapter(tmp_path, name)

    expected = run("run")
    heads = {name for name in expected if ".score." in name}
    assert len(heads) == (2 if stage == "step_reward" else 0)
    step = manifest.step_directory(tmp_path / "run" / "checkpoints", 2)
    shutil.copytree(step, tmp_path / "same" / "checkpoints" / step.name)
    shutil.copytree(step, tmp_path / "resharded" / "checkpoints" / step.name)
    assert _equal(run("same"), expected)
    resharded = run("resharded", 2, parallel={"tensor": 2, "sequence": True})
    for name, value in expected.items():
        # Adam divides by the root of its second moment, which enlarges the rounding of fp32.
        torch.testing.assert_close(resharded[name], value, atol=2e-4, rtol=0)

    kind_of_model, keys = ("CausalLM", {})
    if stage == "step_reward":
        kind_of_model, keys = "TokenClassification", {"num_labels": 1}
    adapted = getattr(peft, f"AutoPeftModelFor{kind_of_model}").from_pretrained(
        tmp_path / "run" / "adapter", **keys
    )
    merged = getattr(transformers, f"AutoModelFor{kind_of_model}").from_pretrained(tmp_path / "run" / "hf")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, atol=1e-4, rtol=1e-4)

    start_from = adapter | {"init_from": str(tmp_path / "run" / "adapter")}
    again = run("again", adapter=start_from, optimizer={"lr": 1e-30, "warmup_steps": 0}, train={"steps": 1})
    assert _equal(again, expected)
