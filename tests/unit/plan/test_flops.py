"""Operations computed by hand, and compared with torch's count while the real trainer's step runs."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from megatron_post_kernels import linear_logprob
from torch.utils.flop_counter import FlopCounterMode

from megatron_post.config.schema import Config
from megatron_post.data.pack import Pack
from megatron_post.models.build import build_model
from megatron_post.plan import activations
from megatron_post.plan.activations import Segment
from megatron_post.plan.fake_ranks import fake_rank
from megatron_post.plan.flops import Load, chunk_flops, loss_again, step_flops
from megatron_post.plan.shape import chunks
from megatron_post.train.optimizer import wrap_data_parallel
from megatron_post.train.parts import make_stage
from megatron_post.train.step import Stepper
from tests.tiny import tiny_config
from tests.unit.plan.measured import packs_of
from tests.unit.plan.test_memory import llama_config

# Unequal packs of 128 have squares 100^2 + 28^2 = 10,784 and 64^2 + 40^2 + 24^2 = 6,272.
LENGTHS = ([100, 28], [64, 40, 24])
LOAD = Load(256, 10_784 + 6_272, 256)
# The last token of each of the five segments has no label.
LABELLED = dataclasses.replace(LOAD, trained=251)


def test_by_hand() -> None:
    """The tiny model has h 64, ffn 96, 4 heads of 16, 2 key-value heads, 4 layers and 250 ids.

    The matrices of a layer are QKV 64 x 128, out 64 x 64, fc1 64 x 192 and fc2 96 x 64: 8,192 + 4,096 +
    12,288 + 6,144 = 30,720. The head has 16,000. So matrices take 6 x 256 tokens x (4 x 30,720 + 16,000) =
    213,319,680, and attention takes 6 x 4 layers x 64 x 17,056 = 26,198,016.
    """
    assert Load.of((Segment(n) for pack in LENGTHS for n in pack), trained=256) == LOAD
    found = step_flops(tiny_config(), LOAD)
    assert (found.matrices, found.attention) == (213_319_680, 26_198_016)
    # The model's attention is two parts forward and four backward. Computing the scores again is a seventh
    # part.
    assert (found.scores, found.recomputed, found.loss, found.reference) == (26_198_016 / 6, 0, 0, 0)
    assert found.model == 239_517_696 and found.executed == found.model + found.scores


def test_grouped_queries_by_hand() -> None:
    """The model has h 8, 2 heads of 4, 1 group, ffn 16, vocabulary 10 and 1 layer.

    The matrices are q and o 64 + 64, k and v 32 + 32, MLP 3 x 128 = 384 and output 80, which is 656 in all.
    Two segments of 3 and 4 tokens have 7 tokens and squares 25. Matrices take 6 x 656 x 7 = 27552. Attention
    takes 2 matmuls x 2 FLOPs x 8 x L^2 / 2 = 16 L^2 forward, and three times that with backward: 48 x 25 =
    1200.
    """
    model = {
        "num_layers": 1,
        "hidden_size": 8,
        "ffn_hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 10,
    }
    assert step_flops(tiny_config(model=model), Load(7, 25, 7)).model == 27552 + 1200


def test_405b_is_six_p() -> None:
    """Without attention, a token of 405B costs 6 FLOPs for each parameter.

    The embedding's 128256 x 16384 and the norms do not count. A reward model's head is one row of 16384
    instead of 128256.
    """
    norms = (2 * 126 + 1) * 16384
    expected = 6 * (405_853_388_800 - 128256 * 16384 - norms)
    assert step_flops(llama_config("llama3.1_405b", {}), Load(1, 0, 1)).model == expected
    reward = llama_config("llama3.1_405b", {}, stage="reward")
    assert step_flops(reward, Load(1, 0, 1)).model == expected - 6 * 128255 * 16384


def test_only_trained_tokens_have_logits() -> None:
    """With 100 of 256 tokens trained, the head of 16,000 parameters takes 6 x 100 x 16,000 operations.

    The unfused loss computes the other 156 as well.
    """
    load = dataclasses.replace(LOAD, trained=100)
    every, some = step_flops(tiny_config(), LOAD), step_flops(tiny_config(), load)
    assert every.matrices - some.matrices == 6 * 156 * 16_000
    unfused = step_flops(tiny_config(loss={"impl": "unfused"}), load)
    assert unfused.matrices == some.matrices and unfused.loss == 6 * 156 * 16_000


def test_a_response_sees_its_prompt() -> None:
    """20 tokens that attend to 10 before them have 20 x 20 / 2 + 20 x 10 pairs. Twice that is 800.

    The prompt adds 100.
    """
    assert Load.of([Segment(10), Segment(20, seen=10)], trained=9) == Load(30, 900, 9)


def test_additional_operations() -> None:
    """Recomputation and a frozen reference add operations.

    Full recomputation adds the layers' forward pass, a third of their operations. A frozen reference adds a
    whole forward pass. Selective recomputation adds the forward pass of the named modules only.
    """
    plain = step_flops(tiny_config(), LOAD)
    layers = 2 * 256 * 4 * 30_720
    attention = plain.attention / 3
    full = step_flops(tiny_config(recompute={"mode": "full"}), LOAD)
    assert full.recomputed == layers + attention and full.model == plain.model
    core = step_flops(tiny_config(recompute={"mode": "selective"}), LOAD)
    assert core.recomputed == attention
    both = step_flops(tiny_config(recompute={"mode": "selective", "modules": ["mlp", "layernorm"]}), LOAD)
    assert both.recomputed == 2 * 256 * 4 * (12_288 + 6_144)
    frozen = step_flops(tiny_config(stage="dpo", dpo={"reference": "frozen"}), LOAD)
    assert frozen.reference == plain.model / 3 and frozen.model == plain.model


def test_chunks_of_the_fused_loss() -> None:
    """405B on TP 8 has 16,128 rows of 2 bytes, so 512 MiB hold 16,512 tokens.

    131,072 tokens on CP 8 are one chunk. On CP 1 they are eight chunks of 16,384, and seven are computed
    again: (8 - 2/8) t v h in all.
    """
    layout = {"tensor": 8, "sequence": True}
    sizes = {context: llama_config("llama3.1_405b", layout | {"context": context}, pack_length=131072)
             for context in (1, 8)}  # fmt: skip
    assert loss_again(sizes[8], 1.0) == 0 and loss_again(sizes[1], 1.0) == 7 / 8
    assert loss_again(tiny_config(loss={"impl": "unfused"}), 1.0) == 0
    head = 2.0 * 131072 * 128256 * 16384
    assert step_flops(sizes[1], Load(131072, 0, 131072)).loss == head * 7 / 8


def test_ranks_add_up_to_the_model() -> None:
    """All layouts do the same operations together.

    TP 2 pads 250 ids to 256, so the last rank's 128 rows hold 122 real ones.
    """
    whole = step_flops(tiny_config(), LOAD)
    for parallel in (
        {"tensor": 2, "sequence": True},
        {"pipeline": 2},
        {"context": 2},
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "context": 2},
    ):
        assert step_flops(tiny_config(parallel=parallel), LOAD) == whole, parallel
    config = tiny_config(parallel={"tensor": 2})
    (only,) = chunks(config)[0]
    first, last = (chunk_flops(config, only, LOAD, tensor_rank=r) for r in (0, 1))
    assert first.matrices - last.matrices == 6 * 256 * 64 * (128 - 122)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"recompute": {"mode": "full"}},
    "core attention and MLP": {"recompute": {"mode": "selective", "modules": ["core_attn", "mlp"]}},
    "unfused": {"loss": {"impl": "unfused"}},
    "TP 2, SP": {"parallel": {"tensor": 2, "sequence": True}},
    "PP 2": {"parallel": {"pipeline": 2}},
    "frozen reference": {"dpo": {"reference": "frozen"}, "stage": "dpo"},
}


@pytest.mark.parametrize("sections", CASES.values(), ids=CASES.keys())
def test_beside_torchs_counter(sections: dict[str, Any]) -> None:
    """Every rank of the layout steps through both packs while torch counts its matrix products.

    Attention's forward passes are counted at its own call. torch cannot see its backward pass here, which is
    2.5 times a forward pass.
    """
    config = tiny_config(**sections)
    size = config.parallel.model_size
    for rank in range(size):
        matrices, attended = _counted(config, rank, size, packs=[_pack(n, config.stage) for n in LENGTHS])
        (part,) = chunks(config)[rank // config.parallel.tensor]
        found = chunk_flops(config, part, LABELLED, tensor_rank=rank % config.parallel.tensor)
        assert matrices + attended + 2.5 * found.attention / 3 == found.executed
        assert matrices >= found.matrices and attended >= found.attention / 3


def test_beside_torchs_counter_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pack of 382 labels has logits of 128 at a time. Two of three chunks are computed again."""
    monkeypatch.setattr(linear_logprob, "_CHUNK_BYTES", 128 * 250 * 4)
    monkeypatch.setattr(activations, "CHUNK_BYTES", 128 * 250 * 4)
    config = tiny_config(data={"pack_length": 384})
    matrices, _ = _counted(config, 0, 1, packs=[_pack([200, 184], "sft")])
    (part,) = chunks(config)[0]
    found = chunk_flops(config, part, Load(384, 200**2 + 184**2, 382))
    assert found.loss == pytest.approx(2 * 256 * 250 * 64, rel=1e-12)
    assert matrices == pytest.approx(found.matrices + found.loss, rel=1e-12)


def _counted(config: Config, rank: int, size: int, *, packs: list[Pack]) -> tuple[float, float]:
    """(matrix products, attention's forward passes) that a rank of `size` computes in one step."""
    with fake_rank(config.parallel, rank=rank, world_size=size) as topology:
        models = build_model(config, topology, portable=True)
        stage = make_stage(config, topology)
        reference = build_model(config, topology, portable=True) if config.stage == "dpo" else None
        for parameter in (p for model in (*models, *(reference or ())) for p in model.parameters()):
            torch.nn.init.normal_(parameter, std=0.02)
        chunks = wrap_data_parallel(models, config, topology)
        stepper = Stepper(chunks, stage, topology, portable=True, reference=reference)
        with _counting() as (counter, attended):
            stepper(packs)
    return counter.get_total_flops(), sum(attended)


def _pack(lengths: list[int], stage: str) -> Pack:
    """A pack. With DPO the first two segments are a pair."""
    ranks = [-1] * len(lengths)
    ranks[:2] = [0, 1] if stage == "dpo" else [-1, -1]
    (pack,) = packs_of(lengths, ranks, count=1)
    return dataclasses.replace(pack, tokens=pack.tokens % 250)


@contextmanager
def _counting() -> Iterator[tuple[FlopCounterMode, list[float]]]:
    """Torch's counter of matrix products, and a count of attention's forward passes.

    The latter is half of 4 d q^2 for each head of every causal square.
    """
    attended: list[float] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(query: Any, key: Any, *rest: Any, **settings: Any) -> Any:
        assert settings["is_causal"]
        attended.append(4 * query.shape[1] * query.shape[3] * query.shape[2] * key.shape[2] / 2)
        return attend(query, key, *rest, **settings)

    with (
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", noted),
        FlopCounterMode(display=False) as counter,
    ):
        yield counter, attended
