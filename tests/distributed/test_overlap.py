"""`optimizer.overlap` gives the same weights as training without it, over several steps.

Each parameter has its own bucket, so that many collectives overlap with the computation.
"""

import functools
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

import megatron_post.train.optimizer as optimizer_module
from megatron_post.convert.hf_reader import load_weights, open_weights
from megatron_post.convert.hf_writer import gathered_tensors
from megatron_post.data.batch import PackedBatch
from megatron_post.models.build import build_model
from megatron_post.parallel.topology import parallel_run
from megatron_post.stages.base import Metrics
from megatron_post.stages.sft import SFT
from megatron_post.train.optimizer import build_optimizer, gather_weights, wrap_data_parallel
from megatron_post.train.step import Stepper
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_packs

LAYOUTS = {
    "DP2": (2, {}, {}),
    "DP2, tied": (2, {}, {"model": {"tie_word_embeddings": True}}),
    "DP2, unfused loss": (2, {}, {"loss": {"impl": "unfused"}}),
    "PP2 x DP2, tied": (4, {"pipeline": 2}, {"model": {"tie_word_embeddings": True}}),
    "PP2 x VPP2 x DP2": (4, {"pipeline": 2, "virtual_pipeline": 2}, {}),
}


class _Poisoned(SFT):
    """SFT whose first loss after `poisoned` is set has a gradient that is not finite."""

    poisoned = False

    def loss(self, output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Metrics]:
        if self.poisoned:
            self.poisoned, output = False, output * torch.inf
        return super().loss(output, batch)


def _train(
    parallel: dict[str, Any], sections: dict[str, Any], optimizer_keys: dict[str, bool]
) -> tuple[int, list[int], dict[str, Any]]:
    """Take four steps. The second one has a bad pack and is skipped. Held-out packs follow steps 1 and 3.

    Only the first pack of the second data-parallel rank is bad. Returns this rank's data-parallel rank, the
    packs that it reports as bad, and the weights as it would export them.
    """
    config = tiny_config(parallel=parallel, optimizer={"clip_grad": 0.0, **optimizer_keys}, **sections)
    bucket_each = functools.partial(optimizer_module.DistributedDataParallelConfig, bucket_size=1)
    with parallel_run(config.parallel, seed=1) as topology:
        models = build_model(config, topology)
        load_weights(models, open_weights(config.model, seed=3), config.model)
        with mock.patch.object(optimizer_module, "DistributedDataParallelConfig", bucket_each):
            chunks = wrap_data_parallel(models, config, topology)
        assert len(chunks[0].bucket_groups) > 3 or not optimizer_keys or topology.pipeline_rank
        optimizer = build_optimizer(chunks, config)
        stage = _Poisoned(config.loss.trained_roles)
        stepper = Stepper(chunks, stage, topology, portable=True)
        packs = tiny_packs()[topology.data_rank :: topology.data_size]
        bad: list[int] = []
        for step in range(4):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            stepper(packs)
            if step == 1:
                stage.poisoned = topology.data_rank == 1
                bad = stepper.bad_gradients(packs)
                continue
            optimizer.step()
            under_way = [bool(chunk.bucket_groups[0].param_gather_handle) for chunk in chunks]
            beside = config.optimizer.overlap_param_gather_with_optimizer_step
            assert under_way == [beside] + [False] * (len(chunks) - 1)
            if step != 3:
                # The first data-parallel rank has twice as many held-out packs as the second one.
                stepper(packs * (2 - topology.data_rank), forward_only=True)
        gather_weights(chunks)
        weights = dict(gathered_tensors(unwrap_model(chunks), config.model))
        return topology.data_rank, bad, {name: value.clone().numpy() for name, value in weights.items()}


@pytest.mark.parametrize(
    ("name", "switch"),
    [(name, None) for name in LAYOUTS] + [("PP2 x VPP2 x DP2", "overlap_param_gather_with_optimizer_step")],
)
def test_overlap_changes_neither_weights_nor_the_search_for_bad_packs(name: str, switch: str | None) -> None:
    """Weights are equal to the last bit, and only the rank with the bad pack finds it, on every stage.

    The sum of two ranks' gradients does not depend on the order, Adam works by element, and nothing is
    clipped.
    """
    world_size, parallel, sections = LAYOUTS[name]
    expected = run_ranks(_train, world_size, parallel, sections, {})
    keys = {"overlap": True} | ({switch: True} if switch else {})
    found = run_ranks(_train, world_size, parallel, sections, keys)
    for (data_rank, bad, weights), (_, plain_bad, plain_weights) in zip(found, expected, strict=True):
        assert bad == plain_bad == ([0] if data_rank == 1 else [])
        assert weights.keys() == plain_weights.keys() != set()
        for key, value in weights.items():
            np.testing.assert_array_equal(value, plain_weights[key], err_msg=key)
