"""Continued pre-training in every layout, against one rank and `transformers` in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.utils import unwrap_model

from megatron_post.config.layout import segment_multiple, store_layout
from megatron_post.config.schema import Config
from megatron_post.convert.hf_config import to_hf_config
from megatron_post.convert.hf_reader import RandomWeights, load_weights
from megatron_post.convert.hf_writer import gathered_tensors
from megatron_post.convert.mapping import hf_shapes
from megatron_post.data.document_packs import assemble_documents
from megatron_post.data.pack import Pack, pack_of_segments
from megatron_post.data.store_format import StoreSettings
from megatron_post.data.template import Rendered, TokenRole
from megatron_post.data.units import UnitPile
from megatron_post.models.build import build_model
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_post.train.parts import make_stage
from megatron_post.train.step import Stepper
from tests.distributed.gradients import gather_shards
from tests.ranks import run_ranks
from tests.tiny import PACK_LENGTH, tiny_config

transformers = pytest.importorskip("transformers")

LAYOUTS = {
    "TP2": (2, {"tensor": 2}),
    "TP2 + SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 + VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "DP2": (2, {}),
    "TP2 x CP2 x PP2": (8, {"tensor": 2, "context": 2, "pipeline": 2, "sequence": True}),
}
WEIGHTS = 3  # their seed
BEGIN, END = 1, 2


def _documents() -> list[np.ndarray]:
    """Documents of random tokens, which fill four packs and are cut at their ends."""
    rng = np.random.default_rng(7)
    lengths = (30, 5, 61, 90, 17, 40, 120, 70)
    return [np.array([BEGIN, *rng.integers(3, 250, n), END], dtype=np.int32) for n in lengths]


DOCUMENTS = _documents()


def _config(parallel: dict[str, Any], attention: str) -> Config:
    return tiny_config(stage="pretrain", parallel=parallel, pretrain={"attention": attention})


def document_packs(config: Config) -> list[Pack]:
    """The documents as `data pack` packs them for this layout, with padding for CP 2 in every layout.

    All layouts must have the same cuts, because a cut takes the tokens before it away from those behind it.
    """
    pile = UnitPile()
    for number, tokens in enumerate(DOCUMENTS):
        roles = [TokenRole.HEADER] + [TokenRole.BODY] * (len(tokens) - 2) + [TokenRole.TERMINATOR]
        pile.add([Rendered(tokens, np.array(roles, dtype=np.uint8))], source=0, sample=number, turns=0)
    multiple = 1 if config.joins_documents else 4
    assert segment_multiple(config) in (1, multiple)
    settings = StoreSettings(PACK_LENGTH, multiple, "", 0, 1, store_layout(config))  # type: ignore[arg-type]
    assembly = assemble_documents(pile.units(), np.arange(len(pile)), "train", settings)
    columns, packs = assembly.columns(), []
    for pack, (tokens, roles) in enumerate(assembly.packs()):
        begin, end = assembly.segment_ends[pack : pack + 2]
        starts = np.cumsum([0, *columns["padded"][begin:end]])
        segments = [
            Rendered(tokens[start : start + length], roles[start : start + length])
            for start, length in zip(starts, columns["length"][begin:end], strict=False)
        ]
        packs.append(pack_of_segments(segments, pack_length=PACK_LENGTH, segment_multiple=multiple))
    assert len(packs) == 4
    return packs


def _step(config: Config) -> tuple[dict, dict]:
    """Metrics and gradients of one step over the documents."""
    with parallel_run(config.parallel, seed=1) as topology:
        models = build_model(config, topology, portable=True)
        load_weights(models, RandomWeights(config.model, seed=WEIGHTS), config.model)
        chunks = wrap_data_parallel(models, config, topology)
        optimizer = build_optimizer(chunks, config)
        stepper = Stepper(chunks, make_stage(config, topology), topology, portable=True)
        metrics = stepper(document_packs(config)[topology.data_rank :: topology.data_size])
        optimizer.prepare_grads()
        for chunk in chunks:
            gather_shards(chunk)
        found = gathered_tensors(unwrap_model(chunks), config.model, value_of=lambda p: p.main_grad.clone())
        return metrics, {name: gradient.numpy() for name, gradient in found}


def _run(world_size: int, parallel: dict[str, Any], attention: str) -> tuple[dict, dict]:
    results = run_ranks(_step, world_size, _config(parallel, attention))
    metrics = next(m for m, _ in reversed(results) if m)
    return metrics, {name: g for _, part in results for name, g in part.items()}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, tuple[dict, dict]]:
    return {attention: _run(1, {}, attention) for attention in ("document", "pack")}


def _assert_equal(found: tuple[dict, dict], expected: tuple[dict, dict], *, tolerance: float) -> None:
    (metrics, gradients), (sums, wanted) = found, expected
    # Every token is a label once, except the first of each document.
    assert metrics["loss_count"] == sum(len(document) - 1 for document in DOCUMENTS)
    assert metrics["loss"] == pytest.approx(float(sums["loss"]), rel=tolerance)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert np.linalg.norm(gradient - wanted[name]) <= tolerance * np.linalg.norm(wanted[name]), name


def _in_float64(attention: str) -> tuple[dict, dict]:
    """Loss and gradients by a loop over rows of tokens, without packs and masks."""
    config = _config({}, attention)
    values = to_hf_config(config.model, dtype="float64", bos_id=BEGIN, eos_ids=[END], pad_id=None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).double()
    weights = RandomWeights(config.model, seed=WEIGHTS)
    model.load_state_dict({n: weights.read(n, None, 0, 0).double() for n in hf_shapes(config.model)})
    rows: list[np.ndarray] = []
    for pack in document_packs(config):
        spans = zip(pack.cu_seqlens[:-1].tolist(), pack.lengths.tolist(), strict=True)
        pieces = [pack.tokens[start : start + length] for start, length in spans if length]
        rows += [np.concatenate(pieces)] if attention == "pack" else pieces
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        tokens = torch.from_numpy(row).long()
        labels = tokens[1:]
        logps = torch.log_softmax(model(tokens[None]).logits[0, :-1], -1)
        kept = labels != BEGIN
        total = total - logps[torch.arange(len(labels)), labels][kept].sum()
        count += int(kept.sum())
    (total / count).backward()
    return {"loss": total.detach()}, {name: p.grad.numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("attention", ["document", "pack"])
def test_one_rank_equals_a_loop_in_float64(attention: str, one_rank: dict) -> None:
    """The error of an fp32 gradient through four layers and back is 1e-5, as for the other stages."""
    _assert_equal(one_rank[attention], _in_float64(attention), tolerance=2e-5)


@pytest.mark.parametrize("attention", ["document", "pack"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_equals_one_rank(name: str, attention: str, one_rank: dict) -> None:
    world_size, parallel = LAYOUTS[name]
    _assert_equal(_run(world_size, parallel, attention), one_rank[attention], tolerance=1e-5)


def test_what_documents_see_changes_the_loss(one_rank: dict) -> None:
    losses = [one_rank[attention][0]["loss"] for attention in ("document", "pack")]
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[0]
