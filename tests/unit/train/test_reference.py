"""The key of a reference. The same bytes of weights are another model with another shape or precision."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_post.config.sections import Precision
from megatron_post.train.reference import reference_key
from tests.ranks import run_ranks

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def _keys(directories: list[Path]) -> list[str]:
    torch.distributed.init_process_group("gloo")
    one_rank = SimpleNamespace(rank=0, world_size=1)
    keys = [reference_key(directory, Precision(), one_rank) for directory in directories]  # type: ignore[arg-type]
    fp32 = Precision(dtype="fp32")
    keys.append(reference_key(directories[0], fp32, one_rank))  # type: ignore[arg-type]
    torch.distributed.destroy_process_group()
    return keys


def test_the_key_depends_on_everything_that_decides_log_probabilities(tmp_path: Path) -> None:
    """Weights of four heads of 16 have the same shapes as those of eight heads of 8."""
    changes: list[dict] = [
        {},
        {"torch_dtype": "float32"},
        {"num_attention_heads": 8, "num_key_value_heads": 4},
        {"rope_theta": 10000.0},
        {"tie_word_embeddings": True},
    ]
    directories = []
    for number, change in enumerate(changes):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"the same weights")
        (directory / "config.json").write_text(json.dumps(SHAPE | change))
        directories.append(directory)
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "model.safetensors").write_bytes(b"other weights")
    (changed / "config.json").write_text(json.dumps(SHAPE))
    same, also_same, *others = run_ranks(_keys, 1, [*directories, changed])[0]
    assert same == also_same
    assert len({same, *others}) == 6


def test_a_directory_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no safetensors files"):
        reference_key(tmp_path, Precision(), SimpleNamespace(rank=0, world_size=1))  # type: ignore[arg-type]
