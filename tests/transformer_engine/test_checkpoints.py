"""A run goes on as it would have when its layers change between two starts, and what it exports is the same.

The kinds of layers: portable, Transformer Engine's, Transformer Engine's with norms of their own (which are
recomputed), and Transformer Engine's with the portable attention. In fp32 a run has the portable ones, so the
others are chosen by hand here.
"""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.comparisons import PACK_LENGTH, examples, packs
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_packs
from tests.transformer_engine.ranks import needs_wheel, run_with_transformer_engine

pytestmark = needs_wheel

# kind -> whether its layers are the portable ones, and its sections of the config
KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "P": (True, {}),
    "T": (False, {}),
    "N": (False, {"recompute": {"mode": "selective", "modules": ["layernorm"]}}),
    "B": (False, {"optimizer": {"moments": "bf16"}}),
}
# Each kind is resumed by each, itself included. Of the reward model responses share a prompt.
ORDERS = {"sft": "PPTPNTTNNP", "reward": "PPTTP"}


@contextlib.contextmanager
def _trainer(stage: str, run_dir: Path, kind: str, parallel: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """(trainer, position, topology) of a run that starts with layers of this kind."""
    from megatron_post.models import build
    from megatron_post.parallel.topology import parallel_run
    from megatron_post.train import parts

    portable, sections = KINDS[kind]
    data = {"data": {"pack_length": PACK_LENGTH}} if stage == "reward" else {}
    config = tiny_config(run_dir, stage=stage, parallel=parallel, train={"steps": 20}, **sections, **data)
    with (
        mock.patch.object(build, "uses_portable_layers", lambda _: portable),
        mock.patch.object(parts, "uses_portable_attention", lambda _: portable or config.shares_prompts),
        parallel_run(config.parallel, seed=1) as topology,
    ):
        trainer, position = parts.build_trainer(config, topology)
        yield trainer, position, topology


def _losses(stage: str, run_dir: Path, kinds: str, parallel: dict[str, Any]) -> list[float]:
    """Start once for each kind, do a step and save. Returns the steps' losses."""
    found = []
    for kind in kinds:
        with _trainer(stage, run_dir, kind, parallel) as (trainer, position, _):
            found.append(trainer.step(_packs(stage))["loss"])
            trainer.save(position.after(4))
            trainer.checkpoints.wait()
    return found


def _packs(stage: str) -> list[Any]:
    """The same at every step, so that each step lowers the loss."""
    if stage == "reward":
        return packs(examples(12, sizes=(3, 2, 2)), counts=[3, 9], layout="isolated")
    return tiny_packs()


@pytest.mark.parametrize("stage", ORDERS)
def test_each_kind_resumes_each(tmp_path: Path, stage: str) -> None:
    """One run begins and ends where Transformer Engine is not installed. Its losses are those of a run that
    stays there. fp32 sums differ by 1e-6 between the kinds, and a dozen steps of Adam leave 1e-5."""
    kinds = ORDERS[stage]
    (expected,) = run_ranks(_losses, 1, stage, tmp_path / "whole", "P" * (len(kinds) + 2), {})
    run_dir = tmp_path / "run"
    losses = [
        *run_ranks(_losses, 1, stage, run_dir, "P", {})[0],
        *run_with_transformer_engine(_losses, 1, stage, run_dir, kinds, {})[0],
        *run_ranks(_losses, 1, stage, run_dir, "P", {})[0],
    ]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert all(after < 0.999 * before for before, after in pairwise(losses)), "no step was done twice or lost"


def test_shards_resume_shards(tmp_path: Path) -> None:
    """With tensor and sequence parallelism, which shards linear layers and none of the norms beside them."""
    run_dir, parallel, losses = tmp_path / "run", {"tensor": 2, "sequence": True}, []
    for kind in "NPT":
        losses += run_with_transformer_engine(_losses, 2, "sft", run_dir, kind, parallel)[0]
    (expected,) = run_ranks(_losses, 1, "sft", tmp_path / "whole", "PPP", {})
    assert losses == pytest.approx(expected, rel=1e-5)


def _unchanged(**_: Any) -> contextlib.AbstractContextManager[None]:
    """In place of `torch_optimizer`. As on a GPU, megatron-core's own choice stays."""
    return contextlib.nullcontext()


def _losses_of_adams(run_dir: Path, adams: str) -> list[float]:
    """As `_losses`, with this package's Adam (A) or Transformer Engine's FusedAdam (F).

    B has moments in bf16, where FusedAdam is megatron-core's own choice.
    """
    from megatron_post.parallel import cpu
    from tests.transformer_engine.stand_in import CALLS

    found = []
    for adam in adams:
        CALLS.clear()
        with contextlib.ExitStack() as stack:
            if adam in "FB":
                stack.enter_context(mock.patch.object(cpu, "torch_optimizer", _unchanged))
            found += _losses("sft", run_dir, "B" if adam == "B" else "T", {})
        assert bool(CALLS["multi_tensor_adam"]) == (adam == "F")
    return found


@pytest.mark.parametrize(("ranks", "adams"), [(1, "AFFAF"), (2, "FFA")])
def test_each_adam_resumes_each(tmp_path: Path, ranks: int, adams: str) -> None:
    """FusedAdam keeps moments and the count of steps under the names that checkpoints have.

    On two ranks the optimizer's state is sharded.
    """
    starts = [adams] if ranks == 1 else adams
    losses: list[float] = []
    for start in starts:
        losses += run_with_transformer_engine(_losses_of_adams, ranks, tmp_path / "run", start)[0]
    (expected,) = run_ranks(_losses, 1, "sft", tmp_path / "whole", "P" * len(adams), {})
    assert losses == pytest.approx(expected, rel=1e-5)


def test_moments_in_bf16_do_not_use_fused_adam(tmp_path: Path) -> None:
    """FusedAdam resumes a checkpoint of theirs, and the reverse.

    Rounding changes a moment by up to 2^-8. An update is the first moment by the root of the second, so it
    changes by up to 1.5 * 2^-8. The updates behind the first one lower the loss by less than a third of it,
    so that it differs by less than 2^-9.
    """
    (losses,) = run_with_transformer_engine(_losses_of_adams, 1, tmp_path / "run", "BFFB")
    (expected,) = run_ranks(_losses, 1, "sft", tmp_path / "whole", "PPPP", {})
    assert losses == pytest.approx(expected, rel=2**-9) and losses != expected
    assert all(after < 0.999 * before for before, after in pairwise(losses))


def _exports(stage: str, run_dir: Path, kinds: str) -> list[dict[str, bytes]]:
    """The files of weights that each kind of layers exports from the newest checkpoint."""
    from megatron.core.utils import unwrap_model

    from megatron_post.convert.hf_writer import export_hf
    from megatron_post.data.tokenizer import train_small_tokenizer

    tokenizer = train_small_tokenizer(["ab"], 264)
    found = []
    for kind in kinds:
        with _trainer(stage, run_dir, kind, {}) as (trainer, position, topology):
            assert position.step
            target = run_dir / kind
            export_hf(unwrap_model(trainer.chunks), trainer.config.model, tokenizer, topology, target)
        found.append({path.name: path.read_bytes() for path in target.glob("*.safetensors")})
    return found


@pytest.mark.parametrize(("stage", "kinds"), [("sft", "PTN"), ("reward", "PT")])
def test_exports(tmp_path: Path, stage: str, kinds: str) -> None:
    """Byte for byte the same from every kind of layers."""
    run_with_transformer_engine(_losses, 1, stage, tmp_path, "T", {})
    first, *others = run_with_transformer_engine(_exports, 1, stage, tmp_path, kinds)[0]
    assert first and all(files == first for files in others)
