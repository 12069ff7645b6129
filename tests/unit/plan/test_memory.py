"""Predicted memory compared with the live bytes of the real trainer in 37 layouts, and figures by hand."""

from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from megatron_post.config.schema import Config
from megatron_post.plan.activations import Activations, Layers, Segment
from megatron_post.plan.memory import memory
from tests.ranks import run_ranks
from tests.tiny import tiny_config
from tests.unit.plan.measured import packs_of, peak_of_fake_rank, peak_of_gloo_rank

# The model is wide enough that activations dominate the measured bytes.
MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 352,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "rope_scaling": None,
}
ALL = {"tensor": 2, "sequence": True, "context": 2, "pipeline": 2}


class Case(NamedTuple):
    """A layout, and the rank of it that is measured."""

    ranks: int
    rank: int
    parallel: dict[str, Any]
    sections: dict[str, Any] = MappingProxyType({})  # type: ignore[assignment]
    stage: str = "sft"
    dtype: str = "fp32"


CASES = {
    "one rank": Case(1, 0, {}),
    "bf16": Case(1, 0, {}, dtype="bf16"),
    "moments in bf16": Case(1, 0, {}, {"optimizer": {"moments": "bf16"}}),
    "moments in bf16, bf16": Case(1, 0, {}, {"optimizer": {"moments": "bf16"}}, dtype="bf16"),
    "moments in bf16, DP2": Case(2, 1, {}, {"optimizer": {"moments": "bf16"}}, dtype="bf16"),
    "TP2": Case(2, 0, {"tensor": 2}),
    "TP2 + SP": Case(2, 0, {"tensor": 2, "sequence": True}),
    "PP2, first": Case(2, 0, {"pipeline": 2}),
    "PP2, last": Case(2, 1, {"pipeline": 2}),
    "PP4, second": Case(4, 1, {"pipeline": 4}),
    "PP2 x VPP2, first": Case(2, 0, {"pipeline": 2, "virtual_pipeline": 2}),
    "PP2 x VPP2, last": Case(2, 1, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": Case(2, 1, {"context": 2}),
    "CP4": Case(4, 3, {"context": 4}),
    "DP2": Case(2, 1, {}),
    "unfused loss": Case(1, 0, {}, {"loss": {"impl": "unfused"}}),
    "full recompute": Case(1, 0, {}, {"recompute": {"mode": "full"}}),
    "full recompute, PP2, bf16": Case(2, 0, {"pipeline": 2}, {"recompute": {"mode": "full"}}, dtype="bf16"),
    "core attention recomputed": Case(1, 0, {}, {"recompute": {"mode": "selective"}}),
    "MLP recomputed": Case(1, 0, {}, {"recompute": {"mode": "selective", "modules": ["mlp"]}}),
    "TP2 x SP x CP2 x PP2, bf16, first": Case(8, 0, ALL, dtype="bf16"),
    "TP2 x SP x CP2 x PP2, bf16, last": Case(8, 7, ALL, dtype="bf16"),
    "DPO, reference in the store": Case(1, 0, {}, stage="dpo"),
    "DPO, frozen reference": Case(2, 0, {"tensor": 2}, {"dpo": {"reference": "frozen"}}, stage="dpo"),
    "DPO, isolated rows, TP2": Case(2, 0, {"tensor": 2}, {"dpo": {"layout": "isolated"}}, stage="dpo"),
    "reward, separate rows": Case(1, 0, {}, {"reward": {"layout": "separate"}}, stage="reward"),
    "reward, isolated rows, TP2": Case(2, 0, {"tensor": 2}, stage="reward"),
    "LoRA": Case(1, 0, {}, {"adapter": {"rank": 8}}),
    "LoRA, bf16": Case(1, 0, {}, {"adapter": {"rank": 8}}, dtype="bf16"),
    "LoRA, TP2 + SP": Case(2, 0, {"tensor": 2, "sequence": True}, {"adapter": {"rank": 8}}),
    "LoRA, PP2 x VPP2, last": Case(2, 1, {"pipeline": 2, "virtual_pipeline": 2}, {"adapter": {"rank": 8}}),
    "LoRA of attention, CP2": Case(
        2, 1, {"context": 2}, {"adapter": {"rank": 8, "targets": ["q_proj", "v_proj"]}}
    ),
    "LoRA, full recompute, PP2, bf16": Case(
        2, 0, {"pipeline": 2}, {"adapter": {"rank": 8}, "recompute": {"mode": "full"}}, dtype="bf16"
    ),
    "LoRA with dropout, MLP recomputed": Case(
        1,
        0,
        {},
        {
            "adapter": {"rank": 8, "dropout": 0.1},
            "recompute": {"mode": "selective", "modules": ["mlp"]},
        },
    ),
    "DoRA, TP2 x SP x CP2 x PP2, bf16": Case(
        8, 0, ALL, {"adapter": {"kind": "dora", "rank": 8}}, dtype="bf16"
    ),
    "DoRA, TP2": Case(2, 0, {"tensor": 2}, {"adapter": {"kind": "dora", "rank": 8}}),
    "LoRA, DPO with its base": Case(
        2, 0, {"tensor": 2}, {"adapter": {"rank": 8}, "dpo": {"reference": "base"}}, stage="dpo"
    ),
    "LoRA, reward, TP2": Case(2, 0, {"tensor": 2}, {"adapter": {"rank": 8}}, stage="reward"),
}


def _config(case: Case) -> Config:
    sections = {"precision": {"dtype": case.dtype}, "data": {"pack_length": 512}, **case.sections}
    return tiny_config(stage=case.stage, model=MODEL, parallel=case.parallel, **sections)


def _segments(case: Case) -> tuple[list[int], list[int], list[Segment]]:
    """Lengths, ranks and segments: a prompt and two responses in isolated rows, or plain segments."""
    if _config(case).shares_prompts:
        return [256, 128, 128], [-1, 0, 1], [Segment(256), Segment(128, 256), Segment(128, 256)]
    ranks = [-1, -1, -1] if case.stage == "sft" else [-1, 0, 1]
    lengths = [256, 128, 128]
    return lengths, ranks, [Segment(length) for length in lengths]


@pytest.mark.parametrize("name", CASES)
def test_predicted_is_within_3_percent_of_live_bytes(name: str) -> None:
    case = CASES[name]
    config = _config(case)
    data_size = case.ranks // config.parallel.model_size
    lengths, ranks, segments = _segments(case)
    reference = case.stage == "dpo" and config.dpo.reference == "store"
    packs = packs_of(lengths, ranks, count=4 // data_size, reference=reference)
    measured = peak_of_fake_rank(config, packs, rank=case.rank, world_size=case.ranks)
    pipeline_rank = case.rank * config.parallel.pipeline // case.ranks
    found = memory(config, data_size=data_size, layers="portable", segments=segments)[pipeline_rank]
    print(f"{name}: {measured / 1e6:.3f} MB measured, {found.total / 1e6:.3f} predicted")
    assert found.total == pytest.approx(measured, rel=0.03), found.kinds


def test_a_fake_rank_holds_what_a_real_one_holds() -> None:
    """The live bytes of each rank of TP 2 x PP 2 on gloo equal those on the fake group.

    Real receives of gloo wait for other times, so a pipeline tensor of 64 KiB more or less may be alive, of
    19 MB.
    """
    case = Case(4, 0, {"tensor": 2, "sequence": True, "pipeline": 2})
    config, packs = _config(case), packs_of([256, 256], [-1, -1], count=4)
    real = run_ranks(peak_of_gloo_rank, 4, config, packs)
    fake = [peak_of_fake_rank(config, packs, rank=rank, world_size=4) for rank in range(4)]
    assert fake == pytest.approx(real, rel=0.01)


def test_static_memory_by_hand() -> None:
    """One layer of the tiny model at TP 2, bf16 and DP 4.

    A parameter takes 4 bytes of gradients, 2 of parameters, and 12 / 4 of the optimizer, or 8 / 4 with
    moments in bf16.
    """
    config = tiny_config(
        model={**MODEL, "num_layers": 1}, parallel={"tensor": 2}, precision={"dtype": "bf16"}
    )
    (found,) = memory(config, data_size=4)
    # QKV 128 x (64 + 2 x 32), projection 64 x 128, fc1 128 x 352, fc2 176 x 128, two norms; embedding and
    # head 256 x 128 each (512 rows over 2 ranks), the last norm.
    count = 128 * 128 + 64 * 128 + 128 * 352 + 176 * 128 + 2 * 128 + 2 * 256 * 128 + 128
    assert found.parameters == count
    assert found.kinds["parameters"] == 2 * count and found.kinds["gradients"] == 4 * count
    assert found.kinds["optimizer"] == 12 * count // 4
    optimizer = config.optimizer.model_copy(update={"moments": "bf16"})
    (less,) = memory(config.model_copy(update={"optimizer": optimizer}), data_size=4)
    assert less.kinds == found.kinds | {"optimizer": 8 * count // 4}


def test_user_buffers_by_hand() -> None:
    """There are twelve buffers of 8,192 x 4,096 numbers. With FP8 eight of them have one byte per number."""
    parallel = {"tensor": 2, "sequence": True, "tp_comm_overlap": True}
    for fp8, size in ((None, 12 * 2), ("tensorwise", 8 + 4 * 2)):
        (found,) = memory(llama_config("llama3.1_8b", parallel, precision={"fp8": fp8}), data_size=1)
        assert found.kinds["user buffers"] == 8192 * 4096 * size


def test_an_exchanged_output_is_kept_twice() -> None:
    """2,048 of 8,192 tokens have 4,096 numbers of 2 bytes in each layer."""
    ledgers = (
        Activations(
            llama_config("llama3.1_8b", {"context": 4, "cp_comm_type": kind}),
            "transformer_engine",
            (Segment(8192),),
        )
        for kind in ("p2p", "a2a")
    )
    before, after = (ledger.whole_layer() for ledger in ledgers)
    assert after - before == 2048 * 4096 * 2


def test_a_norm_that_is_fused_into_the_mlp() -> None:
    """The norm has 8,192 tokens of 4,096 numbers in bf16, and a statistic of 4 bytes for each token.

    tests/transformer_engine counts what is recomputed. The MLP's own norm is recomputed with it, unless norms
    are modules of their own.
    """

    def norms(layers: Layers, *modules: str) -> int:
        recompute = {"mode": "selective", "modules": list(modules)}
        config = llama_config("llama3.1_8b", {}, recompute=recompute)
        return Activations(config, layers, (Segment(8192),)).norms()

    stream, statistics = 8192 * 4096 * 2, 8192 * 4
    assert norms("transformer_engine", "core_attn") == 2 * (2 * stream + statistics)
    assert norms("transformer_engine", "mlp") == norms("mixed", "mlp") == 3 * stream + statistics
    assert norms("transformer_engine", "mlp", "layernorm") == 2 * (stream + statistics)
    assert norms("portable", "mlp") == norms("portable", "core_attn")


def test_fused_gradients_by_hand() -> None:
    """An unused bf16 tensor for each of the four shapes of a layer's weights stays alive.

    While fc2's backward pass runs, its weight gradient of 14,336 x 4,096 no longer exists. The next largest
    working memory is two gradients of 1,024 x 14,336 instead of one.
    """
    plain, fused = (
        llama_config("llama3.1_8b", {}, pack_length=1024, optimizer={"gradient_accumulation_fusion": fusion})
        for fusion in (False, True)
    )
    (found,) = memory(fused, data_size=1)
    assert found.kinds["unused gradients"] == 2 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    ledgers = (Activations(config, "transformer_engine", (Segment(1024),)) for config in (plain, fused))
    before, after = (ledger.layer_backward() for ledger in ledgers)
    assert before - after == 14336 * 4096 * 2 - 1024 * 14336 * 2


def test_weights_in_fp8_by_hand() -> None:
    """Of 32 layers with four matrices each, only FP8 is held, once as it is and once transposed.

    That is 2 bytes for each of 218,103,808 parameters of a layer, where there were 2 in bf16 and 2 in FP8.
    The embedding, the output layer and the norms stay bf16.
    """
    kept, rounded = (
        llama_config("llama3.1_8b", {}, precision={"fp8": "tensorwise", "fp8_param_gather": key})
        for key in (False, True)
    )
    matrices = 32 * 218_103_808
    (before,), (after,) = (memory(config, data_size=1) for config in (kept, rounded))
    assert before.kinds["fp8 weights"] == 2 * matrices and after.kinds["fp8 weights"] == matrices
    assert before.kinds["parameters"] - after.kinds["parameters"] == matrices
    (blackwell,) = memory(rounded, data_size=1, fp8_copies=1)
    assert "fp8 weights" not in blackwell.kinds


def test_chunks_of_the_fused_loss() -> None:
    """128,256 rows over 8 ranks are 16,128 with padding. 512 MiB hold 16,640 tokens of them in bf16.

    131,072 / 8 = 16,384 tokens are one chunk. On one rank with 128,256 rows and h 4,096, 8,192 tokens are one
    chunk as well, because their 2.1 GB of logits are less than 512 MiB and an fp32 gradient of 2.1 GB. 10,285
    tokens are more, and become six chunks of 1,792.
    """
    config = llama_config("llama3.1_405b", {"tensor": 8, "context": 8, "sequence": True}, pack_length=131072)
    ledger = Activations(config, "transformer_engine", (Segment(131072),))
    assert ledger.loss_chunk(16384) == 16384
    one = llama_config("llama3.1_8b", {}, pack_length=8192)
    ledger = Activations(one, "transformer_engine", (Segment(8192),))
    assert [ledger.loss_chunk(n) for n in (100, 8192, 10_284, 10_285)] == [100, 8192, 10_284, 1792]
    assert ledger.loss()["loss"] == 8192 * (128256 + 4096) * 2 + 8 * 8192 * 4
    unfused = one.model_copy(update={"loss": one.loss.model_copy(update={"impl": "unfused"})})
    ledger = Activations(unfused, "transformer_engine", (Segment(8192),))
    assert ledger.loss()["loss"] == 8192 * 128256 * 2 + 8 * 8192 * 4


def test_reward_head_has_no_logits() -> None:
    config = llama_config("llama3.1_8b", {}, pack_length=8192, stage="reward")
    (found,) = memory(config, data_size=1)
    assert found.parameters == 8_030_261_248 - 128256 * 4096 + 4096
    assert found.kinds["loss"] < 2**30 / 4


def test_frozen_reference_costs_the_parameters_again() -> None:
    stored = llama_config("llama3.1_8b", {"tensor": 2}, stage="dpo")
    frozen = llama_config("llama3.1_8b", {"tensor": 2}, stage="dpo", dpo={"reference": "frozen"})
    (a,), (b,) = memory(stored, data_size=1), memory(frozen, data_size=1)
    assert b.total - a.total == 2 * a.parameters


def llama_config(
    preset: str, parallel: dict[str, Any], *, pack_length: int = 8192, stage: str = "sft", **sections: Any
) -> Config:
    from megatron_post.config.load import validate

    return validate(
        {
            "stage": stage,
            "run_dir": "unused",
            "model": {"preset": preset},
            "tokenizer": {"path": "unused"},
            "data": {"store": "unused", "pack_length": pack_length},
            "parallel": parallel,
            "train": {"steps": 1, "global_batch": 4},
            **sections,
        },
        origin="test",
    )
