"""Gathers whole gradients, for the tests of layouts."""

from typing import Any

import torch


def gather_shards(chunk: Any) -> None:
    """Undo the reduce-scatter, so that every rank has all shards of the reduced gradients."""
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            group = buffer.data_parallel_group
            shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)
