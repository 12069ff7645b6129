"""Weights in FP8 (`precision.fp8_param_gather`) are rounded from exact ones, which are saved and exported.

Transformer Engine's own FP8 tensors and megatron-core's own optimizer run here, and torch rounds the values.
Multiplications are in bf16, of weights that are converted back, because the stand-in has none in FP8.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_config, tiny_packs
from tests.transformer_engine.ranks import needs_wheel, run_with_transformer_engine

pytestmark = needs_wheel

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, {}, {}),
    "TP2 + SP": (2, {"tensor": 2, "sequence": True}, {}),
    "DP2 x PP2 + VPP2, overlapped with the step": (
        4,
        {"pipeline": 2, "virtual_pipeline": 2},
        {"optimizer": {"overlap": True, "overlap_param_gather_with_optimizer_step": True}},
    ),
}


def _config(run_dir: Path, parallel: dict[str, Any], sections: dict[str, Any], *, key: bool) -> Any:
    return tiny_config(
        run_dir,
        model={"ffn_hidden_size": 128},
        precision={"dtype": "bf16", "fp8": "tensorwise", "fp8_param_gather": key},
        parallel=parallel,
        checkpoint={"keep": 9},
        train={"steps": 20},
        **sections,
    )


@contextlib.contextmanager
def _trainer(config: Any) -> Iterator[Any]:
    """(trainer, position, topology). Layers keep weights in FP8, and multiply outside of the FP8 context.

    megatron-core gathers FP8 and bf16 weights in one coalesced call. gloo would join them to one tensor of
    bf16, so it gathers one after the other here.
    """
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.transformer.transformer_block as block

    from megatron_post.parallel.topology import parallel_run
    from megatron_post.train import parts

    context = block.get_fp8_context

    def no_multiplications(*args: Any, is_init: bool = False, **kwargs: Any) -> Any:
        return context(*args, is_init=True, **kwargs) if is_init else contextlib.nullcontext()

    def synchronous(function: Any) -> Any:
        return lambda *args, async_op=False, **kwargs: function(*args, async_op=False, **kwargs)

    names = ("dist_all_gather_func", "dist_reduce_scatter_func")
    one_by_one = {name: synchronous(getattr(buffers, name)) for name in names}
    one_by_one["_coalescing_manager"] = lambda *_, **__: contextlib.nullcontext(mock.Mock())
    with (
        mock.patch.multiple(buffers, **one_by_one),
        mock.patch.object(block, "get_fp8_context", no_multiplications),
        parallel_run(config.parallel, seed=1) as topology,
    ):
        yield *parts.build_trainer(config, topology), topology


def _check_rounding(trainer: Any, *, key: bool) -> None:
    """Each FP8 weight has the bytes and the scale that its exact weight in bf16 gives, also transposed."""
    from megatron.core.fp8_utils import is_float8tensor

    from megatron_post.train.fp8_weights import exact_weights
    from megatron_post.train.optimizer import gather_weights

    if trainer.config.optimizer.overlap:  # the next forward pass would gather them
        gather_weights(trainer.chunks)
    value_of = exact_weights(trainer.optimizer)
    weights = [p for chunk in trainer.chunks for p in chunk.parameters() if is_float8tensor(p)]
    layers = 4 // trainer.config.parallel.pipeline
    assert len(weights) == (4 * layers if key else 0), "QKV, projection, fc1 and fc2"
    for weight in weights:
        again = weight._get_quantizer().quantize(value_of(weight))
        assert torch.equal(weight._data, again._data) and torch.equal(weight._scale_inv, again._scale_inv)
        assert not weight._transpose_invalid and torch.equal(weight._transpose, weight._data.t())
        assert not torch.equal(weight.dequantize(), value_of(weight)), "something is rounded"


def _run(config: Any, steps: range, export: str | None = None) -> list[float]:
    """Start, take steps of these numbers, save and export. Returns the losses on the last pipeline stage."""
    from megatron.core.utils import unwrap_model

    from megatron_post.convert.hf_writer import export_hf
    from megatron_post.data.tokenizer import train_small_tokenizer
    from megatron_post.train.fp8_weights import exact_weights
    from megatron_post.train.optimizer import gather_weights

    key = config.precision.fp8_param_gather
    with _trainer(config) as (trainer, position, topology):
        _check_rounding(trainer, key=key)
        losses = [trainer.step(tiny_packs(seed=number)).get("loss") for number in steps]
        _check_rounding(trainer, key=key)
        trainer.save(position.after(4))
        trainer.checkpoints.wait()
        if export is not None:
            gather_weights(trainer.chunks)
            export_hf(
                unwrap_model(trainer.chunks),
                config.model,
                train_small_tokenizer(["ab"], 264),
                topology,
                Path(config.run_dir) / export,
                value_of=exact_weights(trainer.optimizer),
            )
    return losses


def _content(run_dir: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    from megatron_post.convert.dist_checkpoint import DistCheckpoint

    source, found = DistCheckpoint(run_dir / "checkpoints" / f"step-{step:08d}"), {}
    for name, kind in source.kinds.items():
        found[name] = torch.full(kind.shape, torch.nan, dtype=kind.dtype)
        assert source.read_rectangle(name, None, (0,) * len(kind.shape), found[name]) == found[name].numel()
    return found


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_checkpoints_and_exports_are_exact(tmp_path: Path, name: str) -> None:
    """A run goes to layers without FP8 weights and back, and everything in its checkpoints stays as it is.

    The weights of a checkpoint are its fp32 weights in bf16. One rank then goes on as one that did not stop.
    """
    ranks, *layout = LAYOUTS[name]
    stays, moves = tmp_path / "stays", tmp_path / "moves"
    losses: dict[Path, list[float]] = {stays: [], moves: []}
    starts = [(moves, True, range(2), "a"), (moves, False, range(0), "b"), (moves, True, range(2, 3), None)]
    if ranks == 1:
        starts.append((stays, True, range(3), None))
    for directory, key, steps, export in starts:
        config = _config(directory, *layout, key=key)
        losses[directory] += run_with_transformer_engine(_run, ranks, config, steps, export)[-1]
    first, second, last = (_content(moves, step) for step in range(1, 4))
    weights = {name: value for name, value in first.items() if not name.startswith("optimizer.")}
    assert len(weights) == len(first) / 4, "each has fp32 weights and two moments"
    for key, value in weights.items():
        assert torch.equal(value, first[f"optimizer.state.param.{key}"].bfloat16())
    assert _same(first, second) and not _same(first, last)
    if ranks == 1:
        assert losses[moves] == losses[stays] and _same(last, _content(stays, 1))
    one, other = ({p.name: p.read_bytes() for p in (moves / n).glob("*.safetensors")} for n in "ab")
    assert one and one == other


def _begin(config: Any, source: Path | None) -> None:
    """Start a run, from the weights of a checkpoint if there is one, and save it."""
    from megatron_post.convert.dist_checkpoint import DistCheckpoint
    from megatron_post.train.fp8_weights import has_fp8_weights
    from megatron_post.train.loading import load_checkpoint
    from megatron_post.train.parts import load_model

    with _trainer(config) as (trainer, position, topology):
        if source is not None:
            checkpoint = DistCheckpoint(source, is_verified=True)
            load_checkpoint(checkpoint, trainer.chunks, trainer.optimizer, weights_only=True)
        _check_rounding(trainer, key=config.precision.fp8_param_gather)
        trainer.save(position)
        trainer.checkpoints.wait()
        models = load_model(config, topology)
        assert not has_fp8_weights(models), "a reference has none, since no optimizer rounds its weights"


def test_a_run_begins_with_exact_weights(tmp_path: Path) -> None:
    """The first fp32 weights are the initial ones in bf16, or those of a converted checkpoint, unrounded."""
    for key in (True, False):
        config = _config(tmp_path / f"fresh-{key}", {}, {}, key=key)
        run_with_transformer_engine(_begin, 2, config, None)
    fresh = _content(tmp_path / "fresh-True", 0)
    assert _same(fresh, _content(tmp_path / "fresh-False", 0))
    trained = _config(tmp_path / "trained", {}, {}, key=False)
    run_with_transformer_engine(_run, 1, trained, range(1))
    source = tmp_path / "trained" / "checkpoints" / "step-00000001"
    for key in (True, False):
        config = _config(tmp_path / f"from-{key}", {}, {}, key=key)
        run_with_transformer_engine(_begin, 2, config, source)
    begun = _content(tmp_path / "from-True", 0)
    assert _same(begun, _content(tmp_path / "from-False", 0)) and not _same(begun, fresh)
