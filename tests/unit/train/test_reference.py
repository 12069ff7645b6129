"""The key of a reference. The same bytes of weights are another model with another shape or precision."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from megatron_post.config.sections import Precision
from megatron_post.data.reference_writer import ReferenceWriter
from megatron_post.data.store import open_store
from megatron_post.data.store_checksums import StoreError
from megatron_post.train.reference import reference_key
from tests.ranks import run_ranks
from tests.unit.data.small_store import small_store

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


def test_a_reference_of_other_roles_is_refused(tmp_path: Path) -> None:
    """A store names the roles that it has log-probabilities of. Earlier stores have those of all tokens."""
    store = small_store(tmp_path / "s", 2)
    writer = ReferenceWriter(store)
    writer.create("key", ("body",))
    for pack in range(2):
        writer.write(pack, np.full(16, -1.0))
    writer.publish()
    opened = open_store(tmp_path / "s", "train")
    opened.read_reference("key", ("body",))
    assert opened.read(1).reference_logps is not None
    with pytest.raises(
        StoreError, match=r"of the roles body, and dpo.trained_roles is body, terminator; run"
    ):
        opened.read_reference("key", ("body", "terminator"))
    node: Any = zarr.open_group(tmp_path / "s", mode="r+")["train/reference_logps"]
    del node.attrs["trained_roles"]
    open_store(tmp_path / "s", "train").read_reference("key", ("body", "terminator"))
