"""Makes a CPU look like a GPU without Transformer Engine and Apex, to run this package's GPU code.

`torch.cuda.is_available()` is true, gloo replaces NCCL, and tensors are on the CPU. megatron-core keeps the
optimizer that it selects itself. The GPU has its own random generator. Its state has 16 bytes like that of a
real GPU, which are a seed and an offset. No CUDA kernel runs, nothing is asynchronous, and `Tensor.is_cuda`
is false.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_post.parallel.cpu import cpu_as_cuda


class CudaGenerator:
    """A generator with the state of a CUDA generator.

    A draw moves its offset, and not the CPU's generator.
    """

    def __init__(self) -> None:
        self._seed, self._offset = 0, 0

    def manual_seed(self, seed: int) -> None:
        self._seed, self._offset = seed, 0

    def get_state(self, *_: Any, **__: Any) -> torch.Tensor:
        return torch.tensor([self._seed, self._offset]).view(torch.uint8)

    def set_state(self, state: torch.Tensor, *_: Any, **__: Any) -> None:
        if state.numel() != 16:
            raise RuntimeError("RNG state is wrong size")
        self._seed, self._offset = state.view(torch.int64).tolist()

    def draw(self) -> float:
        self._offset += 4
        generator = torch.Generator().manual_seed(1000 * self._seed + self._offset)
        return torch.rand((), generator=generator).item()


@contextlib.contextmanager
def cuda_stand_in() -> Iterator[CudaGenerator]:
    """Within this context `parallel_run` runs its code for a GPU."""
    import megatron.core.optimizer as core_optimizer
    import megatron.core.optimizer.distrib_optimizer as core_distributed
    import megatron.core.tensor_parallel.random as core_random

    chosen = {
        module: {name: getattr(module, name) for name in names}
        for module, names in (
            (core_optimizer, ("Adam", "USING_PYTORCH_OPTIMIZER")),
            (core_distributed, ("Adam", "HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER")),
        )
    }
    assert core_optimizer.USING_PYTORCH_OPTIMIZER, "this machine has Transformer Engine or Apex"
    start, generator = dist.init_process_group, CudaGenerator()
    states = {"get": generator.get_state, "set": generator.set_state}
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu_as_cuda())
        for module, values in chosen.items():
            stack.enter_context(mock.patch.multiple(module, **values))
        cuda = {f"{verb}_rng_state": function for verb, function in states.items()}
        cuda |= {"is_available": lambda: True, "manual_seed": generator.manual_seed}
        cuda["get_device_name"] = lambda: "a stand-in"
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        tracked = {f"_{verb}_cuda_rng_state": function for verb, function in states.items()}
        stack.enter_context(mock.patch.multiple(core_random, **tracked))
        gloo = mock.patch.object(dist, "init_process_group", lambda _, **kwargs: start("gloo", **kwargs))
        stack.enter_context(gloo)
        yield generator
