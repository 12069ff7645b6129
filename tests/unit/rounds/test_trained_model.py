"""The config of a trained model's directory is valid for any number of ranks."""

import json
from pathlib import Path

import pytest

from megatron_post.config.layout import world_errors
from megatron_post.config.load import ConfigError
from megatron_post.convert.hf_config import to_hf_config
from megatron_post.rounds.score import score_file
from megatron_post.rounds.trained_model import config_of_model
from tests.tiny import tiny_config
from tests.unit.convert.models import weights_of, write_hf


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    values = to_hf_config(tiny_config().model, dtype="float32", bos_id=0, eos_ids=[1], pad_id=None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, []),
        (2, []),
        (8, ["parallel.tensor=2"]),
        (12, ["parallel.pipeline=2"]),
        (8, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    ],
)
def test_any_number_of_data_parallel_ranks(
    directory: Path, world_size: int, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", str(world_size)), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    data = {"store": "unused", "pack_length": 256}
    config = config_of_model(directory, {"stage": "dpo", "data": data}, overrides)
    assert not world_errors(config, world_size=world_size, has_gpu=False, has_transformer_engine=False)


def test_scores_without_an_interleaved_schedule(tmp_path: Path) -> None:
    model, directory = tiny_config().model, tmp_path / "model"
    write_hf(directory, model, weights_of(model, scalar_head=True), scalar_head=True)
    overrides = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]
    with pytest.raises(ConfigError, match="virtual_pipeline=2: packs are scored one by one"):
        score_file(directory, tmp_path / "rows.jsonl", tmp_path / "scores.jsonl", overrides)
