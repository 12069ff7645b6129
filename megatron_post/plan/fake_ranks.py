"""Runs as one rank of thousands, with fake process groups and collectives that do nothing."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_post.config.sections import Parallel
from megatron_post.parallel.cpu import cpu_as_cuda
from megatron_post.parallel.topology import Topology


@contextlib.contextmanager
def fake_rank(
    parallel: Parallel, *, rank: int, world_size: int, gpu: torch.device | None = None
) -> Iterator[Topology]:
    """Run as `rank` of `world_size` within this context.

    Tensors that are received from another rank have undefined values. Gathered parts are copies of this
    rank's part. gpu: the device of modules, by default the CPU. Raises `ValueError` if a GPU is visible that
    was not requested, because megatron-core would use it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if gpu is None and torch.cuda.is_available():
        raise ValueError("a dry run needs no GPU and must not see one: run it with CUDA_VISIBLE_DEVICES=''")
    with cpu_as_cuda() if gpu is None else torch.cuda.device(gpu):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor,
                pipeline_model_parallel_size=parallel.pipeline,
                virtual_pipeline_model_parallel_size=(
                    parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
                ),
                context_parallel_size=parallel.context,
                create_gloo_process_groups=False,  # gloo would connect to ranks that do not exist
            )
            groups = ProcessGroupCollection.use_mpu_process_groups()
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            yield Topology(
                groups=groups,
                rank=rank,
                world_size=world_size,
                tensor_rank=groups.tp.rank(),
                pipeline_rank=groups.pp.rank(),
                context_rank=groups.cp.rank(),
                data_rank=groups.dp.rank(),
                data_size=groups.dp.size(),
                device=gpu or torch.device("cpu"),
            )
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
