"""Continued pre-training from rows to an export, on real ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from megatron_post.config.schema import Config
from megatron_post.data.build import build_store
from megatron_post.data.tokenizer import train_small_tokenizer
from megatron_post.storage import manifest
from megatron_post.train.run import train
from tests.ranks import run_ranks
from tests.tiny import tiny_config


def _config(directory: Path, name: str = "run", **sections: Any) -> Config:
    """A run of twelve steps on 200 functions, with a schedule that anneals to 0."""
    texts = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 9) for i in range(200)]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "code.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_small_tokenizer(texts[:50], 300).save(directory / "tokenizer")
    values: dict[str, Any] = {
        "model": {"vocab_size": 512},
        "tokenizer": {"path": str(directory / "tokenizer")},
        "data": {
            "store": str(directory / "store"),
            "sources": [{"name": "code", "path": str(directory / "code.jsonl")}],
        },
        "train": {"steps": 12, "global_batch": 4, "export_hf": True},
        "optimizer": {"lr": 2e-3, "schedule": "linear", "warmup_steps": 2},
        "checkpoint": {"every": 6, "keep": 9},
    }
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return tiny_config(directory / name, stage="pretrain", **values)


@pytest.mark.parametrize("attention", ["document", "pack"])
def test_resume_is_bit_exact_and_layouts_agree(tmp_path: Path, attention: str) -> None:
    """A run that goes on from step 6 ends with the same bytes, and in another layout with equal values."""
    keys = {"pretrain": {"attention": attention}}
    build_store(_config(tmp_path, **keys), console=Console(quiet=True))
    run_ranks(train, 1, _config(tmp_path, **keys))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[1]["lr"] == 2e-3 and lines[-1]["lr"] == 0
    step = manifest.step_directory(tmp_path / "run/checkpoints", 6)
    expected = load_file(tmp_path / "run/hf/model.safetensors")
    for name, ranks, layout in (
        ("same", 1, {}),
        ("resharded", 4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    ):
        shutil.copytree(step, tmp_path / name / "checkpoints" / step.name)
        run_ranks(train, ranks, _config(tmp_path, name, parallel=layout, **keys))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["step"] == 7
        files = (tmp_path / name / "hf").glob("*.safetensors")
        found = {key: value for file in files for key, value in load_file(file).items()}
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if name == "same":
                assert torch.equal(found[key], value), key
            else:
                # Adam divides by the root of its second moment, which enlarges the rounding of fp32.
                np.testing.assert_allclose(found[key], value, atol=2e-4)


def test_other_documents_are_another_run(tmp_path: Path) -> None:
    """What a token sees is a part of the run, so a checkpoint is not continued with another setting."""
    build_store(_config(tmp_path), console=Console(quiet=True))
    run_ranks(train, 1, _config(tmp_path, train={"steps": 2}))
    other = _config(tmp_path, train={"steps": 3}, pretrain={"attention": "pack"})
    assert "pretrain.attention" in run_ranks(_error_of_train, 1, other)[0]


def _error_of_train(config: Config) -> str:
    try:
        train(config)
    except ValueError as error:
        return str(error)
    return ""
