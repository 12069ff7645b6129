"""What ranks save is the same in every layout: weights and Adam's state, bit for bit."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_post.config.schema import Config
from megatron_post.convert.dist_checkpoint import DistCheckpoint
from megatron_post.models import specs
from megatron_post.models.specs import RMSNorm
from megatron_post.parallel.topology import parallel_run
from megatron_post.train import manifest
from megatron_post.train.run import build_trainer
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_packs

LAYOUTS = [
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    (2, {}),
    (2, {"context": 2}),
    (4, {"tensor": 2}),
    (1, {}),
]


def _train_or_resume_and_save(config: Config) -> None:
    """Two steps where there is no checkpoint, else none; then a checkpoint one step later."""
    with parallel_run(config.parallel, seed=1) as topology:
        trainer, position = build_trainer(config, topology)
        if not position.step:
            for packs in (tiny_packs(4, seed=1), tiny_packs(4, seed=2)):
                trainer.step(packs)
        trainer.save(position.after(4))
        trainer.checkpoints.wait()


def _whole(directory: Path) -> dict[str, Tensor]:
    manifest.verify(directory)
    checkpoint, found = DistCheckpoint(directory), {}
    for key, kind in checkpoint.kinds.items():
        found[key] = torch.empty(kind.shape, dtype=kind.dtype)
        checkpoint.read_into(key, None, 0, found[key])
    return found


@pytest.mark.parametrize(("stage", "dtype"), [("sft", "fp32"), ("sft", "bf16"), ("reward", "fp32")])
def test_the_same_in_every_layout(tmp_path: Path, stage: str, dtype: str) -> None:
    """Saved by one layout, loaded and saved again by the next, six times; 256 ids, so that no layout pads."""
    saved: dict[str, Tensor] = {}
    for step, (ranks, parallel) in enumerate(LAYOUTS, start=1):
        config = tiny_config(
            tmp_path / "run",
            stage=stage,
            model={"vocab_size": 256},
            parallel=parallel,
            precision={"dtype": dtype},
            checkpoint={"keep": len(LAYOUTS)},
        )
        run_ranks(_train_or_resume_and_save, ranks, config)
        whole = _whole(manifest.step_directory(tmp_path / "run" / "checkpoints", step))
        states = {key.split(".")[2] for key in whole if key.startswith("optimizer.state.")}
        assert states == {"param", "exp_avg", "exp_avg_sq"}
        saved = saved or whole
        assert whole.keys() == saved.keys()
        for key, value in saved.items():
            assert torch.equal(whole[key], value), (key, parallel)
    if stage == "sft":  # the packs hold no pairs to learn from
        assert all(bool(value.any()) for key, value in saved.items() if ".exp_avg." in key)


class _WithScales(RMSNorm):
    """A norm that keeps something beside its tensors, as Transformer Engine's layers do."""

    scales: Tensor | None = None

    def get_extra_state(self) -> Tensor | None:
        return self.scales

    def set_extra_state(self, state: Tensor | None) -> None:
        self.scales = state


def _scales_after_resume(config: Config, scales: float | None) -> tuple[int, float | None]:
    """Where training stands after it resumed with layers that keep scales, and these; then a checkpoint one
    step later, with `scales`."""
    with mock.patch.object(specs, "RMSNorm", _WithScales), parallel_run(config.parallel, seed=1) as topology:
        trainer, position = build_trainer(config, topology)
        norm = unwrap_model(trainer.chunks[0]).decoder.final_layernorm
        found = None if norm.scales is None else float(norm.scales)
        norm.scales = None if scales is None else torch.tensor(scales)
        trainer.save(position.after(4))
        trainer.checkpoints.wait()
        return position.step, found


def test_scales_that_the_checkpoint_lacks_begin_afresh(tmp_path: Path) -> None:
    """The portable layers save none; whoever saves some gets them back."""
    config = tiny_config(tmp_path / "run", checkpoint={"keep": 5})
    run_ranks(_train_or_resume_and_save, 1, config)
    assert run_ranks(_scales_after_resume, 1, config, 2.5) == [(1, None)]
    assert run_ranks(_scales_after_resume, 1, config, None) == [(2, 2.5)]
