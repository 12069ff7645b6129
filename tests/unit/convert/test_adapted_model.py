"""PEFT directories: merged while they are read, merged models of them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_post.convert.open_model import open_model
from megatron_post.convert.peft_directory import PeftDirectory
from megatron_post.convert.source import read_rows
from tests.unit.rounds.models import tiny_policy

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
transformers = pytest.importorskip("transformers")


def _adapter(directory: Path, base: Path, **settings: Any) -> Path:
    """A PEFT directory with random parts for the model in `base`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 3, "lora_alpha": 7, **settings})
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(len(settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["v_proj", "down_proj"], "use_rslora": True},
        {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    ],
)
def test_merged_rows_are_those_of_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = tiny_policy(tmp_path / "base")
    directory = _adapter(tmp_path / "adapter", base, **settings)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(loaded, directory).merge_and_unload().state_dict()
    found = open_model(directory)
    assert list(found.tensors) == list(open_model(base).tensors)
    for name, kind in found.tensors.items():
        value, rows = expected[name].to(kind.dtype), kind.shape[0]
        assert torch.allclose(read_rows(found, name, 0, rows), value, atol=1e-6, rtol=1e-2), name
        assert torch.equal(read_rows(found, name, 1, rows), read_rows(found, name, 0, rows)[1:]), name


def _change(directory: Path, **values: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA is supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"bias": "all"}, "a Llama has no biases"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}, "is not a directory here"),
        ({"r": 4}, "expected"),
        ({"r": None}, "adapter_config.json"),
        ({"lora_alpha": "many"}, "adapter_config.json"),
    ],
)
def test_other_configs_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    directory = _adapter(tmp_path / "adapter", tiny_policy(tmp_path / "base"), target_modules=["q_proj"])
    _change(directory, **change)
    with pytest.raises(ValueError, match=message):
        open_model(directory)


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    directory = _adapter(tmp_path / "adapter", tiny_policy(tmp_path / "base"), target_modules=["q_proj"])
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({n: v for n, v in tensors.items() if n != name}, file)
    with pytest.raises(ValueError, match="1 tensor"):
        open_model(directory)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, file)
    with pytest.raises(ValueError, match="quantized"):
        open_model(directory)
    file.rename(directory / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle, which can run code"):
        PeftDirectory(directory)
