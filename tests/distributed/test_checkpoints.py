"""Every layout saves the same weights and the same state of Adam, bit for bit."""

from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_post.config.schema import Config
from megatron_post.convert.dist_checkpoint import DistCheckpoint
from megatron_post.convert.mapping import hf_shapes
from megatron_post.convert.metadata_file import read_metadata
from megatron_post.convert.safetensors_file import OpenFiles
from megatron_post.models import specs
from megatron_post.models.specs import RMSNorm
from megatron_post.parallel.topology import parallel_run
from megatron_post.storage import manifest
from megatron_post.train import loading, resume
from megatron_post.train.loading import METADATA, _read
from megatron_post.train.parts import build_trainer
from megatron_post.train.shards import checkpoint_bytes, own_shards
from tests.checkpoints import checkpoint_tensors
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_packs

LAYOUTS = [
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    (2, {}),
    (4, {"pipeline": 2, "virtual_pipeline": 2}),  # with two optimizers
    (2, {"context": 2}),
    (4, {"tensor": 2}),
    (1, {}),
]


def _train_or_resume_and_save(config: Config) -> None:
    """Take two steps if there is no checkpoint, and none otherwise. Then save as if one step later."""
    with parallel_run(config.parallel, seed=1) as topology:
        trainer, position = build_trainer(config, topology)
        if not position.step:
            for packs in (tiny_packs(4, seed=1), tiny_packs(4, seed=2)):
                trainer.step(packs)
        trainer.save(position.after(4))
        trainer.checkpoints.wait()


@pytest.mark.parametrize(
    ("stage", "dtype", "moments"),
    [
        ("sft", "fp32", "fp32"),
        ("sft", "bf16", "fp32"),
        ("sft", "bf16", "bf16"),
        ("reward", "fp32", "fp32"),
        ("step_reward", "fp32", "fp32"),
    ],
)
def test_every_layout_saves_the_same(tmp_path: Path, stage: str, dtype: str, moments: str) -> None:
    """Seven layouts in turn load the last one's checkpoint and save it again. No layout pads 256 ids."""
    saved: dict[str, Tensor] = {}
    two = {"overlap": True, "overlap_param_gather_with_optimizer_step": True}
    for step, (ranks, parallel) in enumerate(LAYOUTS, start=1):
        config = tiny_config(
            tmp_path / "run",
            stage=stage,
            model={"vocab_size": 256},
            parallel=parallel,
            precision={"dtype": dtype},
            train={"steps": len(LAYOUTS)},
            optimizer={"moments": moments} | (two if ranks == 4 and "pipeline" in parallel else {}),
            checkpoint={"keep": len(LAYOUTS)},
        )
        run_ranks(_train_or_resume_and_save, ranks, config)
        whole = checkpoint_tensors(manifest.step_directory(tmp_path / "run" / "checkpoints", step))
        states = {key.split(".")[2] for key in whole if key.startswith("optimizer.state.")}
        assert states == {"param", "exp_avg", "exp_avg_sq"}
        kept = {value.dtype for key, value in whole.items() if ".exp_avg" in key}
        assert kept == {torch.bfloat16 if moments == "bf16" else torch.float32}
        saved = saved or whole
        assert whole.keys() == saved.keys()
        for key, value in saved.items():
            assert torch.equal(whole[key], value), (key, parallel)
    if stage == "sft":  # the packs have no pairs and no steps, so a reward model has no gradient
        assert all(bool(value.any()) for key, value in saved.items() if ".exp_avg." in key)


def _steps_and_save(config: Config, first: int, last: int) -> None:
    """Start, or resume before step `first`. Take the steps up to `last`, and save."""
    with parallel_run(config.parallel, seed=1) as topology:
        trainer, position = build_trainer(config, topology)
        assert position.step == first - 1
        for step in range(first, last + 1):
            trainer.step(tiny_packs(4, seed=step)[topology.data_rank :: topology.data_size])
            position = position.after(4)
        trainer.save(position)
        trainer.checkpoints.wait()


def _saved(config: Config, step: int) -> dict[str, Tensor]:
    return checkpoint_tensors(manifest.step_directory(Path(config.run_dir) / "checkpoints", step))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_with_moments_in_bf16_is_bit_exact(tmp_path: Path, dtype: str) -> None:
    """Four steps are equal to two steps, a resume and two steps, on two ranks that shard the optimizer."""
    sections: dict[str, Any] = {"optimizer": {"moments": "bf16"}, "precision": {"dtype": dtype}}
    whole, resumed = (tiny_config(tmp_path / name, **sections) for name in ("whole", "resumed"))
    run_ranks(_steps_and_save, 2, whole, 1, 4)
    for first in (1, 3):
        run_ranks(_steps_and_save, 2, resumed, first, first + 1)
    expected, found = _saved(whole, 4), _saved(resumed, 4)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_moments_change_their_dtype_on_a_resume(tmp_path: Path) -> None:
    """Those in fp32 are rounded to bf16, which the change of the run records. Then they are widened again."""
    saved = []
    for step, moments in enumerate(("fp32", "bf16", "fp32"), start=1):
        config = tiny_config(tmp_path / "run", optimizer={"moments": moments}, checkpoint={"keep": 3})
        run_ranks(_train_or_resume_and_save, 1, config)
        saved.append(_saved(config, step))
    for key, value in saved[0].items():
        dtype = torch.bfloat16 if ".exp_avg" in key else torch.float32
        assert saved[1][key].dtype == dtype and torch.equal(saved[1][key], value.to(dtype)), key
        assert saved[2][key].dtype == torch.float32 and torch.equal(saved[2][key], value.to(dtype).float())
    changes = (tmp_path / "run" / "changes.jsonl").read_text()
    assert '"optimizer.moments": ["fp32", "bf16"]' in changes


@pytest.mark.parametrize(
    ("dtype", "moments", "each"), [("bf16", "fp32", 14), ("bf16", "bf16", 10), ("fp32", "fp32", 16)]
)
@pytest.mark.parametrize("stage", ["sft", "reward", "step_reward"])
def test_bytes_that_launch_counts_are_those_that_are_written(
    tmp_path: Path, dtype: str, moments: str, each: int, stage: str
) -> None:
    """The count of tensor bytes is exact and includes padded rows of the vocabulary.

    250 ids are padded to 256 on two tensor-parallel ranks. Files have at most 2 KiB more for each piece.
    """
    config = tiny_config(
        tmp_path / "run",
        stage=stage,
        parallel={"tensor": 2},
        precision={"dtype": dtype},
        optimizer={"moments": moments},
    )
    run_ranks(_train_or_resume_and_save, 2, config)
    directory = manifest.step_directory(tmp_path / "run" / "checkpoints", 1)
    tensors = sum(kind.nbytes for kind in DistCheckpoint(directory).kinds.values())
    padded = config.model.model_copy(update={"vocab_size": 256})
    head = {"scalar_head": stage != "sft", "scores_steps": stage == "step_reward"}
    parameters = sum(prod(shape) for shape in hf_shapes(padded, **head).values())
    assert checkpoint_bytes(config) == tensors == each * parameters
    written = sum(path.stat().st_size for path in directory.glob("*.distcp"))
    pieces = len(read_metadata(directory / ".metadata").storage_data)
    assert tensors < written < tensors + 2048 * pieces


class _WithScales(RMSNorm):
    """A norm that keeps an object besides its tensors, as Transformer Engine's layers do."""

    scales: Tensor | None = None

    def get_extra_state(self) -> Tensor | None:
        return self.scales

    def set_extra_state(self, state: Tensor | None) -> None:
        self.scales = state


def _scales_after_resume(config: Config, scales: float | None) -> tuple[int, float | None]:
    """Resume with layers that keep scales. Returns the step, and the scales of the last norm.

    Then saves one step later, with `scales` in the last norm.
    """
    with mock.patch.object(specs, "RMSNorm", _WithScales), parallel_run(config.parallel, seed=1) as topology:
        trainer, position = build_trainer(config, topology)
        norm = getattr(unwrap_model(trainer.chunks[-1]).decoder, "final_layernorm", None)
        found = None if norm is None or norm.scales is None else float(norm.scales)
        if norm is not None:
            norm.scales = None if scales is None else torch.tensor(scales)
        trainer.save(position.after(4))
        trainer.checkpoints.wait()
        return position.step, found


def test_scales_missing_from_the_checkpoint_keep_their_initial_values(tmp_path: Path) -> None:
    """The portable layers save no scales. Layers that save scales get them back, also on four stages.

    The first of these stages has only the embedding, and so no layer that keeps scales.
    """
    values: dict[str, Any] = {"model": {"num_layers": 2}, "checkpoint": {"keep": 5}}
    one = tiny_config(tmp_path / "run", **values)
    layout = {"pipeline": 4, "embedding_and_loss_as_layers": True}
    four = tiny_config(tmp_path / "run", parallel=layout, **values)
    run_ranks(_train_or_resume_and_save, 1, one)
    assert run_ranks(_scales_after_resume, 1, one, 2.5) == [(1, None)]
    assert run_ranks(_scales_after_resume, 4, four, None) == [(2, None)] * 3 + [(2, 2.5)]


def _resume_where_one_cannot_read(config: Config) -> None:
    with parallel_run(config.parallel, seed=1) as topology:
        failing = {"side_effect": OSError("this disk is gone")} if topology.rank == 1 else {"wraps": _read}
        with mock.patch.object(loading, "_read", **failing):
            build_trainer(config, topology)


def _resume_without_comparing_settings(config: Config) -> None:
    """A manifest may have the settings of the config although its tensors belong to another model."""
    with mock.patch.object(resume, "compare", return_value=([], [])):
        _train_or_resume_and_save(config)


def test_all_ranks_report_why_one_cannot_resume(tmp_path: Path) -> None:
    """First one of two disks fails. Then the model has other sizes."""
    config = tiny_config(tmp_path / "run")
    run_ranks(_train_or_resume_and_save, 2, config)
    message = r"cannot be resumed here. 1 ranks report an error, the first is rank 1: OSError: this disk"
    with pytest.raises(AssertionError, match=message):
        run_ranks(_resume_where_one_cannot_read, 2, config)
    wider = tiny_config(tmp_path / "run", model={"ffn_hidden_size": 128})
    with pytest.raises(AssertionError, match=r"model.ffn_hidden_size: 96 there, 128 here"):
        run_ranks(_train_or_resume_and_save, 2, wider)
    message = r"2 ranks report an error, the first is rank 0: .*linear_fc2.weight is \(4, 64, 96\) there"
    with pytest.raises(AssertionError, match=message):
        run_ranks(_resume_without_comparing_settings, 2, wider)


def test_padding_rows_of_the_vocabulary(tmp_path: Path) -> None:
    """250 ids are padded to 256 on two tensor-parallel ranks. One rank saves, then two, then one again."""
    saved = []
    for step, parallel in enumerate(({}, {"tensor": 2}, {}), start=1):
        config = tiny_config(tmp_path / "run", parallel=parallel, checkpoint={"keep": 3})
        run_ranks(_train_or_resume_and_save, 2 if parallel else 1, config)
        saved.append(checkpoint_tensors(manifest.step_directory(tmp_path / "run" / "checkpoints", step)))
    padded = [key for key, value in saved[1].items() if value.shape[0] == 256]
    assert len(padded) == 2 * 4  # the embedding and the output layer: weights, masters, moments
    for key, value in saved[0].items():
        assert torch.equal(saved[2][key], value), key
        assert torch.equal(saved[1][key][: len(value)], value), key
        assert not saved[1][key][len(value) :].any(), key


def _bytes_read_to_resume(config: Config) -> int:
    read, spent = OpenFiles.read, []

    def counted(self: OpenFiles, path: Path, offset: int, target: memoryview) -> None:
        spent.append(len(target))
        read(self, path, offset, target)

    with parallel_run(config.parallel, seed=1) as topology, mock.patch.object(OpenFiles, "read", counted):
        _, position = build_trainer(config, topology)
    assert position.step
    return sum(spent)


def test_each_rank_reads_only_its_own_part(tmp_path: Path) -> None:
    """fp32 weights, masters and moments of n parameters have 16 n bytes.

    So each of four data-parallel ranks reads 16 n / 4 bytes, apart from the padding of gradient buffers.
    """
    config = tiny_config(tmp_path / "run")
    run_ranks(_train_or_resume_and_save, 4, config)
    parameters = sum(prod(shape) for shape in hf_shapes(config.model).values())
    for spent in run_ranks(_bytes_read_to_resume, 4, config):
        assert spent == pytest.approx(16 / 4 * parameters, rel=0.01)


def _load_with_both_loaders(config: Config) -> None:
    """Load the newest checkpoint, overwrite all values, and load it again with megatron-core's loader."""
    with parallel_run(config.parallel, seed=1) as topology:
        trainer, position = build_trainer(config, topology)
        models, optimizer = unwrap_model(trainer.chunks), trainer.optimizer
        model_states = [model.sharded_state_dict(metadata=METADATA) for model in models]
        states = {f"model{i}": state for i, state in enumerate(model_states)}
        weights = [parameter for model in models for parameter in model.parameters()]
        live = [shard.values for shard in own_shards(states, optimizer)] + [p.detach() for p in weights]
        first = [values.clone() for values in live]
        for values in live:
            values.fill_(0.125)
        wanted = dict(states)
        wanted["optimizer"] = optimizer.sharded_state_dict(states, is_loading=True, metadata=METADATA)
        step = str(manifest.step_directory(trainer.checkpoints.root, position.step))
        loaded = dist_checkpointing.load(wanted, step, get_default_load_sharded_strategy(step))
        for i, model in enumerate(models):
            model.load_state_dict(loaded[f"model{i}"], strict=True)
        optimizer.load_state_dict(loaded["optimizer"])
        assert position.step and len(live) > len(weights)
        for found, expected in zip(live, first, strict=True):
            assert torch.equal(found, expected)


def test_megatron_core_loads_the_same(tmp_path: Path) -> None:
    """Weights, masters and moments of a bf16 run are saved by PP 2 x DP 2 and loaded by TP 2 x DP 2."""
    values: dict[str, Any] = {"model": {"vocab_size": 256}, "precision": {"dtype": "bf16"}}
    saved = tiny_config(tmp_path / "run", parallel={"pipeline": 2}, **values)
    run_ranks(_train_or_resume_and_save, 4, saved)
    config = tiny_config(tmp_path / "run", parallel={"tensor": 2, "sequence": True}, **values)
    run_ranks(_load_with_both_loaders, 4, config)
