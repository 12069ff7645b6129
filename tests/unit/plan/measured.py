"""Measures the real trainer's parts with the tracker, on fake or real ranks.

Tensors are real, and the schedule is megatron-core's.
"""

from unittest import mock

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_post.config.schema import Config
from megatron_post.data.pack import Pack
from megatron_post.data.template import TokenRole
from megatron_post.models.build import build_model
from megatron_post.parallel.topology import Topology, parallel_run
from megatron_post.plan.fake_ranks import fake_rank
from megatron_post.plan.tracker import Tracker
from megatron_post.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_post.train.parts import make_stage
from megatron_post.train.step import Stepper


def packs_of(lengths: list[int], ranks: list[int], *, count: int, reference: bool = False) -> list[Pack]:
    """Packs of segments without padding.

    ranks: of the responses of a unit, or -1 for segments that are not compared.
    """
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
    total = int(cu_seqlens[-1])
    units = np.cumsum([rank <= 0 for rank in ranks])
    return [
        Pack(
            tokens=np.random.default_rng(number).integers(0, 512, total).astype(np.int32),
            roles=np.full(total, TokenRole.BODY, np.uint8),
            cu_seqlens=cu_seqlens,
            lengths=np.diff(cu_seqlens).astype(np.int32),
            sources=np.zeros(len(lengths), np.int32),
            sample_ids=np.arange(len(lengths), dtype=np.uint64),
            unit_ids=units,
            ranks=np.array(ranks, np.int32),
            reference_logps=np.zeros(total, np.float32) if reference else None,
        )
        for number in range(count)
    ]


def peak_of_fake_rank(config: Config, packs: list[Pack], *, rank: int, world_size: int) -> int:
    """Peak bytes of one rank during a training step. The other ranks are fake."""
    with fake_rank(config.parallel, rank=rank, world_size=world_size) as topology:
        gloo = mock.Mock(return_value=topology.groups.dp_cp)
        with mock.patch.multiple(
            parallel_state, get_data_parallel_group_gloo=gloo, get_expert_data_parallel_group_gloo=gloo
        ):
            return _peak(config, packs, topology)


def peak_of_gloo_rank(config: Config, packs: list[Pack]) -> int:
    """Peak bytes of a real rank during a training step, with real communication."""
    with parallel_run(config.parallel, seed=1) as topology:
        return _peak(config, packs, topology)


def _peak(config: Config, packs: list[Pack], topology: Topology) -> int:
    with Tracker() as tracker:
        stage = make_stage(config, topology)
        models = build_model(config, topology, portable=True)
        frozen = config.copies_reference
        reference = build_model(config, topology, portable=True) if frozen else None
        for model in (*models, *(reference or ())):
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        chunks = wrap_data_parallel(models, config, topology)
        del models, model, parameter
        optimizer = build_optimizer(chunks, config)
        shared = config.runs_reference and not frozen
        stepper = Stepper(
            chunks,
            stage,
            topology,
            portable=True,
            reference=chunks if shared else reference,
            dropout_seed=1,
        )
        # the first step creates Adam's moments
        optimizer.prepare_grads()
        optimizer.step()
        for chunk in chunks:
            chunk.zero_grad_buffer()
        tracker.peak = 0
        stepper(packs)
        return tracker.peak
