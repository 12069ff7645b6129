"""Adapters in a plan: trained parameters and FLOPs, by hand and as built."""

import pytest

from megatron_post.models.build import build_model
from megatron_post.plan.adapters import held_parameters, trained_parameters
from megatron_post.plan.fake_ranks import fake_rank
from megatron_post.plan.flops import Load, step_flops
from megatron_post.plan.shape import chunks
from tests.tiny import tiny_config


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("adapter", [{}, {"kind": "dora"}, {"targets": ["v_proj", "down_proj"]}])
def test_parameters_are_those_of_the_built_chunks(stage: str, adapter: dict) -> None:
    config = tiny_config(stage=stage, adapter={"rank": 4, **adapter}, parallel={"tensor": 2, "pipeline": 2})
    for rank, parts in ((0, chunks(config)[0]), (3, chunks(config)[1])):
        with fake_rank(config.parallel, rank=rank, world_size=4) as topology:
            (model,) = build_model(config, topology, portable=True)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == sum(trained_parameters(config, chunk) for chunk in parts)
        assert sum(p.numel() for p in model.parameters()) == sum(held_parameters(config, c) for c in parts)


def test_flops_by_hand() -> None:
    """100 tokens, 10 of them trained. Frozen matrices take 4 P t and adapters 6 P t.

    Of a layer the matrices have 64 x (64 + 2 x 32) + 64 x 64 + 3 x 64 x 96 = 30,720 parameters. Its adapters
    of rank 2 have 2 x (128 + 2 x 96 + 128 + 3 x 160) = 1,856.
    """
    config = tiny_config(adapter={"rank": 2})
    found = step_flops(config, Load(100, 0, 10))
    head = 64 * 250 * 10
    assert found.matrices == 4 * (4 * 30720 * 100 + head) + 6 * 4 * 1856 * 100
    full = step_flops(tiny_config(), Load(100, 0, 10))
    assert full.matrices == 6 * (4 * 30720 * 100 + head)
    sharded = tiny_config(adapter={"rank": 2}, parallel={"tensor": 2, "pipeline": 2})
    assert step_flops(sharded, Load(100, 0, 10)).matrices == found.matrices
