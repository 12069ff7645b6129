"""Builds a layout on one machine: every distinct stage of real modules on fake tensors, with one pack traced.

Fake tensors are meta tensors that remember their device, so 405B takes no memory and no arithmetic. Process
groups are fake as well. The trace records the collectives that this trainer's portable layers call. Those of
Transformer Engine run at the same places, but its context parallelism is a ring instead of a gather.
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import random as core_random
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_post.config.layout import world_errors
from megatron_post.config.load import ConfigError, raise_for
from megatron_post.config.schema import Config
from megatron_post.config.sections import Parallel
from megatron_post.data.batch import PackedBatch
from megatron_post.models.adapted import base_parameters
from megatron_post.models.adapter_dropout import begin_microbatch, microbatch_state
from megatron_post.models.build import build_model
from megatron_post.models.packing import portable_segments
from megatron_post.parallel.context import ContextSplit
from megatron_post.parallel.selection import Selection, select
from megatron_post.parallel.topology import Topology
from megatron_post.plan.fake_ranks import fake_rank
from megatron_post.plan.shape import chunks, model_parameters
from megatron_post.plan.tracker import Tracker

AXES = ("tensor", "context", "data", "pipeline")


@dataclass(frozen=True)
class StageReport:
    """The built and traced chunks of one pipeline rank.

    parameters: on each of its tensor-parallel ranks, without adapters. collectives: (name, group, calls,
    bytes) of one pack's forward and backward pass. activation_bytes: the peak of the chunk that takes most.
    """

    pipeline_rank: int
    rank: int
    parameters: int
    layers: tuple[int, ...]
    collectives: tuple[tuple[str, str, int, int], ...]
    activation_bytes: int


@dataclass(frozen=True)
class DryRun:
    world_size: int
    data_size: int
    model_parameters: int
    groups: dict[str, tuple[int, int]]  # axis -> (groups, ranks of each)
    stages: tuple[StageReport, ...]
    seconds: float


def dry_run(config: Config, *, world_size: int, per_node: int, ranks: Sequence[int] | None = None) -> DryRun:
    """Build and trace the stages of `ranks` (by default one rank of every pipeline stage).

    Raises `ConfigError` for a config that cannot run on this number of ranks, for groups that do not hold
    each rank once, for tensor-parallel groups that cross nodes, and if the parameters of the stages do not
    add up to the model's.
    """
    began = time.perf_counter()
    raise_for(world_errors(config, world_size=world_size, has_gpu=True, has_transformer_engine=True))
    groups = check_groups(config.parallel, world_size=world_size, per_node=per_node)
    stride = world_size // config.parallel.pipeline
    every = [stage * stride for stage in range(config.parallel.pipeline)]
    chosen = every if ranks is None else list(ranks)
    outside = [rank for rank in chosen if not 0 <= rank < world_size]
    if outside:
        raise ConfigError(f"rank {outside[0]} is not one of {world_size}")
    # The dry run builds the portable layers, which have no FP8.
    no_fp8 = config.precision.model_copy(update={"fp8": None, "fp8_param_gather": False})
    config = config.model_copy(update={"precision": no_fp8})
    stages = tuple(_stages(config, chosen, world_size=world_size))
    total = model_parameters(config)
    if chosen == every:
        built = _whole_model(config, stages)
        if built != total:
            raise ConfigError(f"the stages hold {built:,} parameters together, the model has {total:,}")
    data_size = world_size // config.parallel.model_size
    return DryRun(world_size, data_size, total, groups, stages, time.perf_counter() - began)


def check_groups(parallel: Parallel, *, world_size: int, per_node: int) -> dict[str, tuple[int, int]]:
    """megatron-core's groups along every axis, as (number of groups, ranks of each).

    Raises `ConfigError` unless each rank is in exactly one group of each axis, and tensor-parallel groups
    stay inside a node.
    """
    from megatron.core.parallel_state import RankGenerator

    if world_size % parallel.model_size:
        raise ConfigError(
            f"{world_size} ranks are not a multiple of tensor x pipeline x context = {parallel.model_size}"
        )
    generator = RankGenerator(
        tp=parallel.tensor,
        ep=1,
        dp=world_size // parallel.model_size,
        pp=parallel.pipeline,
        cp=parallel.context,
        order="tp-cp-ep-dp-pp",
    )
    found = {}
    for axis, token in zip(AXES, ("tp", "cp", "dp", "pp"), strict=True):
        groups = generator.get_ranks(token)
        seen = sorted(rank for group in groups for rank in group)
        if seen != list(range(world_size)):
            raise ConfigError(f"the {axis} groups do not hold each of {world_size} ranks once")
        if axis == "tensor" and any(group[0] // per_node != group[-1] // per_node for group in groups):
            raise ConfigError(
                f"parallel.tensor={parallel.tensor} does not divide the {per_node} GPUs of a node: groups "
                "would cross nodes"
            )
        found[axis] = (len(groups), len(groups[0]))
    return found


def _stages(config: Config, ranks: Sequence[int], *, world_size: int) -> Iterator[StageReport]:
    """The reports of ranks. Ranks with identical chunks are built once."""
    parts, stride = chunks(config), world_size // config.parallel.pipeline
    known: dict[tuple[tuple[int, bool, bool], ...], StageReport] = {}
    for rank in ranks:
        shape = tuple((chunk.layers, chunk.embedding, chunk.head) for chunk in parts[rank // stride])
        if shape not in known:
            known[shape] = _stage(config, shape, rank=rank, world_size=world_size)
        yield dataclasses.replace(known[shape], pipeline_rank=rank // stride, rank=rank)


def _stage(
    config: Config, shape: tuple[tuple[int, bool, bool], ...], *, rank: int, world_size: int
) -> StageReport:
    """Build all chunks of a rank. Of identical chunks only one is traced."""
    with fake_rank(config.parallel, rank=rank, world_size=world_size) as topology:
        packed, trained = _packed(config, topology), _all_tokens(config, topology)
        collectives: Counter[tuple[str, str, str]] = Counter()
        peak = 0
        with _fake_modules(), FakeTensorMode(allow_non_fake_inputs=True):
            models = build_model(config, topology, portable=True)
            parameters = sum(p.numel() for model in models for _, p in base_parameters(model))
            for kind, times in Counter(shape).items():
                with Tracker() as tracker:
                    _trace(models[shape.index(kind)], config, topology, packed, trained)
                peak = max(peak, tracker.peak)
                for name, axis, calls, size in _collectives_by_axis(tracker, topology):
                    collectives[name, axis, "calls"] += times * calls
                    collectives[name, axis, "bytes"] += times * size
        rows = sorted({(name, axis) for name, axis, _ in collectives})
        return StageReport(
            pipeline_rank=topology.pipeline_rank,
            rank=rank,
            parameters=parameters,
            layers=tuple(len(model.decoder.layers) for model in models),
            collectives=tuple((*row, collectives[*row, "calls"], collectives[*row, "bytes"]) for row in rows),
            activation_bytes=peak,
        )


@contextlib.contextmanager
def _fake_modules() -> Iterator[None]:
    """Adapt megatron-core and torch to fake tensors within this context.

    Fake tensors have no generator states, so these are neither saved nor compared. Modules stay on the device
    on which they were made.
    """
    with (
        mock.patch.object(torch.nn.Module, "to", lambda module, *_: module),
        # Without `fp8=None`, a recomputed norm asks Transformer Engine for the state of FP8.
        mock.patch.object(
            tensor_parallel, "CheckpointWithoutOutput", partial(core_random.CheckpointWithoutOutput, fp8=None)
        ),
        mock.patch.object(core_random.CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext()),
        mock.patch.multiple(
            core_random,
            _get_all_rng_states=tuple,
            _set_all_rng_states=lambda *_: None,
            _fork_rng=contextlib.nullcontext,
        ),
    ):
        yield


def _packed(config: Config, topology: Topology) -> PackedSeqParams:
    """The arguments of the portable layers for a pack that is one segment."""
    tokens = torch.zeros(config.data.pack_length, dtype=torch.long)
    cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
    whole = PackedBatch(
        tokens=tokens,
        labels=tokens,
        trained=tokens.bool(),
        positions=torch.arange(len(tokens)),
        segments=tokens,
        cu_seqlens=cu_seqlens,
        lengths=cu_seqlens[1:],
    )
    split = ContextSplit(cu_seqlens, topology.groups.cp.size())
    return portable_segments(whole, split, rank=topology.context_rank, device=tokens.device)


def _all_tokens(config: Config, topology: Topology) -> Selection:
    """All tokens of this rank, which take the most memory if they are trained."""
    return select(
        torch.ones(config.data.pack_length // topology.groups.cp.size(), dtype=torch.bool),
        rank=topology.tensor_rank,
        size=topology.groups.tp.size(),
        sequence_parallel=config.parallel.sequence,
    )


def _trace(
    model: Any, config: Config, topology: Topology, packed: PackedSeqParams, trained: Selection
) -> None:
    """Run this rank's part of one pack forward and backward through a chunk."""
    t = config.data.pack_length // topology.groups.cp.size()
    shard = t // topology.groups.tp.size() if config.parallel.sequence else t
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    tokens = torch.zeros(1, t, dtype=torch.long)
    begin_microbatch(microbatch_state(0, tokens[0]))
    if not model.pre_process:
        hidden = torch.empty(shard, 1, config.model.hidden_size, dtype=dtype, requires_grad=True)
        model.set_input_tensor(hidden)
    output = model(tokens, tokens, None, labels=tokens, packed_seq_params=packed, loss_mask=trained)
    if output.requires_grad:  # with adapters a chunk without layers trains nothing
        torch.autograd.backward(output, torch.empty_like(output))
    model.zero_grad(set_to_none=True)


def _collectives_by_axis(tracker: Tracker, topology: Topology) -> tuple[tuple[str, str, int, int], ...]:
    groups = {"tensor": topology.groups.tp, "context": topology.groups.cp}
    names = {tuple(torch.distributed.get_process_group_ranks(group)): axis for axis, group in groups.items()}
    rows = [
        (kind, names.get(ranks, f"{len(ranks)} ranks"), calls, size)
        for (kind, ranks), (calls, size) in tracker.collectives.items()
        if len(ranks) > 1
    ]
    return tuple(sorted(rows))


def _whole_model(config: Config, stages: Sequence[StageReport]) -> int:
    """Parameters of the whole model, from those of its stages.

    Shards count TP times, copies count once, and the padding of the vocabulary does not count.
    """
    m, p = config.model, config.parallel
    layers = sum(sum(stage.layers) for stage in stages)
    score = m.hidden_size + config.traits.scores_steps
    copied = layers * 2 * m.hidden_size + m.hidden_size + (score if config.traits.scalar_head else 0)
    sharded = (sum(stage.parameters for stage in stages) - copied) * p.tensor
    tables = sum(chunk.embedding for rank in chunks(config) for chunk in rank)
    tied_elsewhere = m.tie_word_embeddings and p.pipeline * p.virtual_pipeline > 1
    tables += (not m.tie_word_embeddings or tied_elsewhere) and not config.traits.scalar_head
    multiple = 128 * p.tensor if p.tensor > 1 else 1
    padding = -m.vocab_size % multiple
    extra = m.vocab_size * m.hidden_size * (tied_elsewhere and not config.traits.scalar_head)
    return sharded + copied - tables * padding * m.hidden_size - extra
