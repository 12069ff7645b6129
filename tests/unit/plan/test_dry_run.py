"""Stages of real modules on fake tensors, and the trace of a pack."""

import pytest

from megatron_post.config.load import ConfigError
from megatron_post.config.sections import Parallel
from megatron_post.plan.dry_run import check_groups, dry_run
from megatron_post.plan.shape import chunk_parameters, chunks
from tests.tiny import tiny_config


def test_groups_of_16384_ranks() -> None:
    """405B at TP 8, CP 8, PP 8 has 32 data-parallel ranks.

    There are 16,384 / 8 groups along each of TP, CP and PP, and 512 along DP.
    """
    parallel = Parallel(tensor=8, sequence=True, context=8, pipeline=8)
    groups = check_groups(parallel, world_size=16384, per_node=8)
    assert groups == {"tensor": (2048, 8), "context": (2048, 8), "data": (512, 32), "pipeline": (2048, 8)}


@pytest.mark.parametrize(
    ("parallel", "world_size", "per_node", "message"),
    [
        (Parallel(tensor=8), 12, 8, "12 ranks are not a multiple"),
        (Parallel(tensor=8), 16, 4, "would cross nodes"),
        (Parallel(tensor=2), 6, 3, "would cross nodes"),
    ],
)
def test_impossible_groups_are_refused(
    parallel: Parallel, world_size: int, per_node: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_groups(parallel, world_size=world_size, per_node=per_node)


def test_collectives_of_a_layer() -> None:
    """The collectives of two layers at TP 2 with sequence parallelism and CP 2 are counted by hand.

    One layer is beside the embedding, one before the head. t is 64 of 128 tokens, h is 64, in fp32. A gather
    or scatter of the sequence has 64 x 64 x 4 bytes. Forward, a layer gathers twice (QKV, fc1) and scatters
    twice (projection, fc2). Backward, it gathers gradients twice and inputs twice, and scatters twice.
    """
    config = tiny_config(
        parallel={"tensor": 2, "sequence": True, "context": 2, "pipeline": 2}, model={"num_layers": 2}
    )
    found = dry_run(config, world_size=8, per_node=8)
    first, last = found.stages
    rows = {(name, axis): (calls, size) for name, axis, calls, size in first.collectives}
    one = 64 * 64 * 4
    # The embedding scatters its output and gathers its gradient.
    assert rows["all-gather", "tensor"] == (7, 7 * one)
    assert rows["reduce-scatter", "tensor"] == (5, 5 * one)
    # Keys and values are gathered: 128 tokens x 16 (one of two groups, on two ranks) x 4 bytes.
    assert rows["all-gather", "context"] == (2, 2 * 128 * 16 * 4)
    assert rows["reduce-scatter", "context"] == (2, 2 * 128 * 16 * 4)
    # The head gathers its input and three statistics of each token, and sums a gradient.
    rows = {(name, axis): (calls, size) for name, axis, calls, size in last.collectives}
    assert rows["all-gather", "tensor"] == (8, 7 * one + 2 * 3 * 64 * 4)
    assert rows["reduce-scatter", "tensor"] == (4, 4 * one)
    assert rows["all-reduce", "tensor"] == (1, one)


def test_recomputed_norms() -> None:
    """The output of recomputed norms is freed, so a layer keeps less. Its collectives are the same.

    megatron-core would ask Transformer Engine, which is not installed here, for the state of FP8.
    """
    parallel = {"tensor": 2, "sequence": True}
    kept = dry_run(tiny_config(parallel=parallel), world_size=2, per_node=2).stages[0]
    config = tiny_config(parallel=parallel, recompute={"mode": "selective", "modules": ["layernorm"]})
    recomputed = dry_run(config, world_size=2, per_node=2).stages[0]
    assert recomputed.collectives == kept.collectives
    assert recomputed.activation_bytes < kept.activation_bytes


@pytest.mark.parametrize("stage", ["sft", "reward", "step_reward"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_stages_hold_the_model(stage: str, mode: str) -> None:
    """Each stage has the parameters that the planner computes.

    dry_run itself compares their sum with the model's.
    """
    config = tiny_config(
        stage=stage, parallel={"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}, recompute={"mode": mode}
    )
    found = dry_run(config, world_size=8, per_node=4)
    assert found.data_size == 2 and found.groups["data"] == (4, 2)
    expected = [sum(chunk_parameters(config, chunk) for chunk in rank) for rank in chunks(config)]
    assert [report.parameters for report in found.stages] == expected
    assert [report.rank for report in found.stages] == [0, 4]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_stages_with_adapters(kind: str) -> None:
    """The parameters are those of the base model, and a stage without layers trains nothing."""
    parallel = {"tensor": 2, "sequence": True, "pipeline": 4, "embedding_and_loss_as_layers": True}
    dropout = 0.1 if kind == "lora" else 0.0
    config = tiny_config(
        adapter={"kind": kind, "rank": 4, "dropout": dropout}, parallel=parallel, model={"num_layers": 2}
    )
    found = dry_run(config, world_size=8, per_node=4)
    expected = [sum(chunk_parameters(config, chunk) for chunk in rank) for rank in chunks(config)]
    assert [report.parameters for report in found.stages] == expected


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match="global_batch=4 is not a multiple of the 8 data-parallel ranks"):
        dry_run(tiny_config(train={"steps": 1, "global_batch": 4}), world_size=8, per_node=8)


def test_a_missing_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 8 is not one of 8"):
        dry_run(tiny_config(train={"steps": 1, "global_batch": 8}), world_size=8, per_node=8, ranks=[8])
