"""A rank is bound to the CPUs next to its GPU, which torch looks up in the kernel's tables."""

import os
from unittest import mock

import pytest

from megatron_post.parallel.numa import bind_to_gpu
from tests.ranks import run_ranks


def _bound(mode: str, gpu: int, cpus: dict[int, set[int]]) -> set[int] | str:
    """This process's CPUs after binding to GPU `gpu`. cpus: the CPUs of each NUMA node of the machine."""
    from torch.numa import binding

    # torch's private functions that ask the device and the kernel. Another version may have other names.
    look_ups = {
        "_get_numa_node_index_for_gpu_index": lambda *, gpu_index: gpu_index // 4,
        "_get_cpu_indices_for_numa_node_MAYBE_NOT_ALLOWED": lambda *, numa_node_index: cpus[numa_node_index],
    }
    with (
        mock.patch.dict(os.environ, MEGATRON_POST_NUMA_BINDING=mode),
        mock.patch.multiple(binding, **look_ups),
    ):
        try:
            bind_to_gpu(gpu)
        except ValueError as error:
            return str(error)
        return os.sched_getaffinity(0)


def test_cpus_of_the_gpus_node() -> None:
    """GPU 5 is on node 1. That node has a second CPU, which this process may not use."""
    allowed = sorted(os.sched_getaffinity(0))
    cpus = {0: {allowed[0]}, 1: {allowed[-1], 10**6}}
    assert run_ranks(_bound, 1, "node", 5, cpus) == [{allowed[-1]}]
    assert run_ranks(_bound, 1, "", 5, cpus) == [set(allowed)]


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("node", "cannot be done for GPU 0: this process may use none of the CPUs there"),
        ("core", "is not one of node, socket, exclusive, core-complex"),
    ],
)
def test_an_impossible_binding_is_an_error(mode: str, reason: str) -> None:
    """Either none of the node's CPUs is allowed, or the mode does not exist."""
    (message,) = run_ranks(_bound, 1, mode, 0, {0: {10**6}})
    assert message.startswith(f"MEGATRON_POST_NUMA_BINDING={mode} {reason}")
    assert "set numa_binding: null in the cluster's file" in message
