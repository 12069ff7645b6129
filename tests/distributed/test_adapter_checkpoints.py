"""Checkpoints of adapters: every layout saves and resumes the same, and only what is trained."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_post.storage import manifest
from megatron_post.train.shards import checkpoint_bytes
from tests.checkpoints import checkpoint_tensors
from tests.distributed.test_checkpoints import LAYOUTS, _train_or_resume_and_save
from tests.ranks import run_ranks
from tests.tiny import tiny_config


@pytest.mark.parametrize(("stage", "kind", "dtype"), [("sft", "lora", "bf16"), ("reward", "dora", "fp32")])
def test_every_layout_saves_the_same(tmp_path: Path, stage: str, kind: str, dtype: str) -> None:
    """Seven layouts in turn load the last one's checkpoint and save it again."""
    saved: dict[str, Tensor] = {}
    for step, (ranks, parallel) in enumerate(LAYOUTS, start=1):
        config = tiny_config(
            tmp_path / "run",
            stage=stage,
            adapter={"kind": kind, "rank": 6},
            model={"vocab_size": 256},
            parallel=parallel,
            precision={"dtype": dtype},
            train={"steps": len(LAYOUTS)},
            checkpoint={"keep": len(LAYOUTS)},
        )
        run_ranks(_train_or_resume_and_save, ranks, config)
        whole = checkpoint_tensors(manifest.step_directory(tmp_path / "run" / "checkpoints", step))
        saved = saved or whole
        assert whole.keys() == saved.keys()
        for key, value in saved.items():
            assert torch.equal(whole[key], value), (key, parallel)
        assert checkpoint_bytes(config) == sum(value.nbytes for value in whole.values())
    trained = {key.removeprefix("optimizer.state.exp_avg.") for key in saved if ".exp_avg." in key}
    assert trained == {key for key in saved if not key.startswith("optimizer.")}
    heads = {key for key in trained if ".adapter." not in key}
    assert heads == ({"output_layer.weight"} if stage == "reward" else set())
