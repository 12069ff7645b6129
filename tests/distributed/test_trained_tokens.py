"""The output layer computes trained tokens alone. Every layout gives the results of a float64 loop over all.

The packs have unequal shares of trained tokens. Some ranks have none at all.
"""

import dataclasses
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_post.convert.hf_reader import load_weights, open_weights
from megatron_post.convert.hf_writer import gathered_tensors
from megatron_post.data.pack import Pack
from megatron_post.data.template import TokenRole
from megatron_post.models import llama
from megatron_post.models.build import build_model
from megatron_post.models.packing import portable_segments
from megatron_post.parallel.context import ContextSplit
from megatron_post.parallel.selection import Selection, select
from megatron_post.stages.sft import SFT
from megatron_post.train.parts import joined_ranks
from tests.distributed.test_layouts import check_equal, gradients, joined
from tests.ranks import run_ranks
from tests.tiny import PACK_LENGTH, tiny_config, tiny_packs

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2 + SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 + VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "DP2": (2, {}),
    "TP2 + SP x CP2 x PP2": (8, {"tensor": 2, "context": 2, "pipeline": 2, "sequence": True}),
}


def uneven_packs() -> list[Pack]:
    """Four packs: trained in their first quarter, not at all, in a single token, and not at all.

    So the second rank of SP and of DP has no trained token, and both have microbatches without any.
    """
    kept = (range(PACK_LENGTH // 4), range(0), range(5, 6), range(0))
    return [_trained_at(pack, tokens) for pack, tokens in zip(tiny_packs(), kept, strict=True)]


def _trained_at(pack: Pack, tokens: range) -> Pack:
    """The pack with its bodies at `tokens` alone. If there is one token it becomes a body."""
    roles = pack.roles.copy()
    roles[roles == TokenRole.TERMINATOR] = TokenRole.BODY
    outside = ~np.isin(np.arange(len(roles)), list(tokens))
    roles[outside & (roles == TokenRole.BODY)] = TokenRole.PROMPT
    if len(tokens) == 1:
        roles[tokens[0]] = TokenRole.BODY
    return dataclasses.replace(pack, roles=roles)


def float64_loop(packs: list[Pack]) -> tuple[dict[str, Any], float, dict[str, Any]]:
    """Metrics, gradient norm and gradients of -log p of the trained labels, from the logits of all tokens."""
    config = tiny_config()
    with joined_ranks(config) as topology:
        (model,) = build_model(config, topology, portable=True)
        load_weights([model], open_weights(config.model, seed=3), config.model)
        model.double()
        total, count = torch.zeros([], dtype=torch.float64), 0
        for pack in packs:
            batch = SFT(config.loss.trained_roles).collate(pack)
            split = ContextSplit(batch.cu_seqlens, 1)
            packed = portable_segments(batch, split, rank=0, device=torch.device("cpu"))
            tokens, positions = batch.tokens[None], batch.positions[None]
            logits = model(tokens, positions, None, labels=None, packed_seq_params=packed)[:, 0, :250]
            for token in batch.trained.nonzero()[:, 0].tolist():
                total = total - logits[token].log_softmax(0)[batch.labels[token]]
                count += 1
        total.backward()
        values = dict(gathered_tensors([model], config.model, value_of=lambda p: p.grad / count))
        norm = torch.stack([value.square().sum() for value in values.values()]).sum().sqrt()
        metrics = {"loss": float(total), "loss_count": count}
        return metrics, float(norm), {name: value.numpy() for name, value in values.items()}


def _gradients(parallel: dict[str, Any], packs: list[Pack]) -> tuple[dict[str, Any], float, dict[str, Any]]:
    return gradients(parallel, {}, packs=packs)


@pytest.fixture(scope="module")
def expected() -> tuple[dict, float, dict]:
    return run_ranks(float64_loop, 1, uneven_packs())[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_a_float64_loop(name: str, expected: tuple[dict, float, dict]) -> None:
    ranks, parallel = LAYOUTS[name]
    results = run_ranks(_gradients, ranks, parallel, uneven_packs())
    check_equal(joined(results), expected, count=expected[0]["loss_count"])


FUSED = {
    "one rank": (1, {}, {}),
    "TP2 + SP": (2, {"tensor": 2, "sequence": True}, {}),
    "PP2 + VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "DP2, overlapped": (2, {}, {"optimizer": {"overlap": True}}),
}


@pytest.mark.parametrize("name", FUSED)
def test_the_gradient_goes_into_the_buffer(name: str, expected: tuple[dict, float, dict]) -> None:
    """With `gradient_accumulation_fusion` the gradients are the same, also without any trained token.

    What autograd gets instead is NaN here, and nothing reads it.
    """
    ranks, parallel, sections = FUSED[name]
    results = run_ranks(_fused_gradients, ranks, parallel, sections, uneven_packs())
    check_equal(joined([found for found, _ in results]), expected, count=expected[0]["loss_count"])
    assert sum(unread for _, unread in results) == 4 * parallel.get("tensor", 1)


def test_a_tied_weight_gets_its_gradient_from_autograd() -> None:
    sections = {"model": {"tie_word_embeddings": True}}
    plain = joined([run_ranks(_fused_gradients, 1, {}, sections, tiny_packs(), False)[0][0]])
    ((found, unread),) = run_ranks(_fused_gradients, 1, {}, sections, tiny_packs())
    check_equal(joined([found]), plain)
    assert unread == 0


def _fused_gradients(
    parallel: dict[str, Any], sections: dict[str, Any], packs: list[Pack], fused: bool = True
) -> tuple[tuple[dict[str, Any], float, dict[str, Any]], int]:
    """`gradients`, and how many tensors autograd got instead of the output layer's gradient."""
    switches = {"optimizer.gradient_accumulation_fusion": fused}
    backward = llama._AddedToMainGrad.backward
    unread = mock.Mock(side_effect=lambda ctx, gradient: backward(ctx, gradient).fill_(torch.nan))
    with mock.patch.object(llama._AddedToMainGrad, "backward", unread):
        found = gradients(parallel, sections, switches, packs=packs)
    return found, unread.call_count


def test_the_packs_leave_ranks_without_trained_tokens() -> None:
    trained = [SFT(["body", "terminator"]).collate(pack).trained for pack in uneven_packs()]
    assert [int(mask.sum()) for mask in trained][1::2] == [0, 0] and int(trained[2].sum()) == 1
    second = select(trained[0], rank=1, size=2, sequence_parallel=True)
    assert second.own is not None and second.own.start == second.own.stop == int(trained[0].sum())


@pytest.mark.parametrize("size", [2, 4])
def test_rows_of_a_selection(size: int) -> None:
    """What the ranks send, one behind the other, has the trained tokens at the rows that are received."""
    trained = torch.tensor([0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    ranks = [select(trained, rank=rank, size=size, sequence_parallel=True) for rank in range(size)]
    share = len(trained) // size
    sent = torch.cat([_sent(part) + rank * share for rank, part in enumerate(ranks)])
    for part in ranks:
        assert part.received is not None
        assert sent[part.received].tolist() == part.tokens.tolist() == [1, 2, 8, 10, 11]
    owned = [part.tokens[part.own] for part in ranks if part.own is not None]
    assert torch.cat(owned).tolist() == [1, 2, 8, 10, 11]


def _sent(selection: Selection) -> torch.Tensor:
    assert selection.sent is not None
    return selection.sent
