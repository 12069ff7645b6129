"""The CPU adapter: megatron-core requires CUDA, and this module maps CUDA to the CPU and gloo.

A run without a GPU enters `cpu_as_cuda()` at its start. On exit everything is undone. A run with a GPU never
enters it. Three things are replaced:

* torch calls that name a CUDA device or pinned memory (a `TorchFunctionMode`),
* `torch.cuda` bookkeeping (streams, events, memory counters) and the generator state that megatron-core's RNG
  tracker keeps,
* megatron-core's Adam, by the one of parallel/adam.py.

megatron-core's warning about the order of CUDA kernels is hidden, because there are no CUDA kernels.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from megatron_post.parallel.adam import torch_optimizer

_CUDA_TYPES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class _CudaCallsToCpu(TorchFunctionMode):
    """Rewrites `device="cuda"`, `pin_memory`, `.cuda()`, `.pin_memory()` and `.type()`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPES.get(args[0].dtype) or func(*args)
        if kwargs.get("device") is not None and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and any(
            isinstance(a, str | torch.device) and _is_cuda(a) for a in args[1:]
        ):
            args = tuple("cpu" if isinstance(a, str | torch.device) and _is_cuda(a) else a for a in args)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")


class _NoStream:
    """A stream or event that never waits. Every CPU operation is complete when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> "_NoStream":
        return self

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def _rng_state(device: Any = None, **_: Any) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.default_generator.set_state(state)


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextlib.contextmanager
def cpu_as_cuda() -> Iterator[None]:
    """Within this context megatron-core runs on the CPU with gloo.

    Raises `RuntimeError` if there is a GPU.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the CPU adapter must not be entered on a machine with a GPU")
    import megatron.core.tensor_parallel.random as core_random

    cuda: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "set_device": _nothing,
        "device_count": lambda: 1,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": _NoStream,
        "default_stream": _NoStream,
        "stream": _NoStream,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "memory_stats": lambda *_: {},
        # torch.manual_seed also seeds CUDA, so calling it here would recurse.
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": _rng_state,
        "set_rng_state": _set_rng_state,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        stack.enter_context(mock.patch.multiple(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing))
        stack.enter_context(
            mock.patch.multiple(
                core_random, _get_cuda_rng_state=_rng_state, _set_cuda_rng_state=_set_rng_state
            )
        )
        stack.enter_context(torch_optimizer(has_gpu=False))
        stack.enter_context(_CudaCallsToCpu())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
        yield
