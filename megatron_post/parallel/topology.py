"""The process groups of a run, and this rank's position in each of them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_post.config.sections import Parallel
from megatron_post.parallel.adam import torch_optimizer
from megatron_post.parallel.cpu import cpu_as_cuda
from megatron_post.parallel.environment import rank_from_environment
from megatron_post.parallel.numa import bind_to_gpu


@dataclass(frozen=True)
class Topology:
    """The tensor, pipeline, context and data groups, and this process's rank in each of them."""

    groups: ProcessGroupCollection
    rank: int
    world_size: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    data_size: int
    device: torch.device

    @property
    def is_reporter(self) -> bool:
        """Whether this is the rank that prints and writes metrics.

        It is the first rank of the last pipeline stage, because only that stage has losses.
        """
        first = self.tensor_rank == self.context_rank == self.data_rank == 0
        return first and self.pipeline_rank == self.groups.pp.size() - 1


@contextlib.contextmanager
def parallel_run(parallel: Parallel, *, seed: int, timeout_minutes: float = 30.0) -> Iterator[Topology]:
    """Join the process group, build megatron-core's groups and seed its generators. The exit undoes it all.

    Without a GPU this enters the CPU adapter and uses gloo. The generators of operations such as dropout have
    equal seeds on data-parallel ranks and different seeds on tensor- and pipeline-parallel ranks, as
    megatron-core expects.
    """
    rank, world_size, local_rank = rank_from_environment()
    has_gpu = torch.cuda.is_available()
    with torch_optimizer(has_gpu=True) if has_gpu else cpu_as_cuda():
        if has_gpu:
            torch.cuda.set_device(local_rank)
            bind_to_gpu(local_rank)
        device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
        dist.init_process_group(
            "nccl" if has_gpu else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            # A single process needs no rendezvous. Without one it takes no port, which could be in use.
            store=dist.HashStore() if world_size == 1 else None,
            rank=rank,
            world_size=world_size,
        )
        try:
            yield _join_groups(parallel, seed=seed, rank=rank, world_size=world_size, device=device)
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _join_groups(
    parallel: Parallel, *, seed: int, rank: int, world_size: int, device: torch.device
) -> Topology:
    from megatron.core import tensor_parallel

    virtual = parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * groups.pp.rank())
    return Topology(
        groups=groups,
        rank=rank,
        world_size=world_size,
        tensor_rank=groups.tp.rank(),
        pipeline_rank=groups.pp.rank(),
        context_rank=groups.cp.rank(),
        data_rank=groups.dp.rank(),
        data_size=groups.dp.size(),
        device=device,
    )
