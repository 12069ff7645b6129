"""Parameters and layers equal the published counts and the models that are built."""

import pytest

from megatron_post.models.build import build_model
from megatron_post.plan.fake_ranks import fake_rank
from megatron_post.plan.shape import chunk_parameters, chunks, model_parameters
from tests.tiny import tiny_config
from tests.unit.plan.test_memory import llama_config


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama3.1_8b", 8_030_261_248),
        ("llama3.1_70b", 70_553_706_496),
        ("llama3.1_405b", 405_853_388_800),
    ],
)
def test_parameters(preset: str, count: int) -> None:
    """The counts of the released weights."""
    assert model_parameters(llama_config(preset, {})) == count


def test_chunks_of_405b() -> None:
    """126 layers, the embedding and the loss are divided over 8 x 8 chunks of 2.

    So one layer is beside the embedding, and one beside the loss.
    """
    parallel = {"pipeline": 8, "virtual_pipeline": 8, "embedding_and_loss_as_layers": True, "tensor": 8}
    parts = chunks(llama_config("llama3.1_405b", parallel))
    assert [sum(chunk.layers for chunk in rank) for rank in parts] == [15, *[16] * 6, 15]
    assert parts[0][0].embedding and parts[0][0].layers == 1 and parts[7][7].head and parts[7][7].layers == 1
    assert sum(chunk.embedding or chunk.head for rank in parts for chunk in rank) == 2


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, {}), (2, {"tensor": 2}), (4, {"pipeline": 4}), (2, {"pipeline": 2, "virtual_pipeline": 2}),
     (4, {"tensor": 2, "pipeline": 2, "embedding_and_loss_as_layers": True})],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_chunks_equal_the_built_models(world_size: int, parallel: dict, stage: str) -> None:
    layers = 6 if parallel.get("embedding_and_loss_as_layers") else 4
    config = tiny_config(stage=stage, parallel=parallel, model={"num_layers": layers})
    tensor = config.parallel.tensor
    for rank in range(0, world_size, tensor):
        with fake_rank(config.parallel, rank=rank, world_size=world_size) as topology:
            models = build_model(config, topology)
            expected = [sum(p.numel() for p in model.parameters()) for model in models]
            layer_counts = [len(model.decoder.layers) for model in models]
        parts = chunks(config)[rank // tensor]
        assert [chunk_parameters(config, chunk) for chunk in parts] == expected
        assert [chunk.layers for chunk in parts] == layer_counts
