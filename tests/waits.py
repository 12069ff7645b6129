"""A device whose results the host cannot read, to find the places where the host would wait for a GPU.

It is torch's meta device, whose tensors have no values. Everything that reads them raises, such as `item`,
`tolist`, `bool` and operations whose output depends on values. Copies do not raise, so they are checked here.
`torch.tensor` and `torch.as_tensor` with a device are not seen, although they wait for their copy.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")


class _ChecksCopies(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if function.namespace == "c10d":  # these have no kernel for such tensors, and the ranks do not exist
            args, kwargs = tree_map(_with_values, (args, kwargs))
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if any(x.device == DEVICE for x in inputs + outputs):
            for x in inputs:
                # An operation may have a number as an operand, which it gets as a tensor without dimensions.
                if x.device != DEVICE and x.dim():
                    _check_copy(function, x, kwargs)
        return result


def _with_values(x: Any) -> Any:
    return torch.empty_like(x, device="cpu") if isinstance(x, Tensor) and x.device == DEVICE else x


def _check_copy(function: Any, source: Tensor, kwargs: dict[str, Any]) -> None:
    where = f"{function} takes {tuple(source.shape)} {source.dtype} from the host"
    assert function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_), f"{where} by itself"
    assert kwargs.get("non_blocking"), f"{where} and waits"
    assert getattr(source, "is_in_pinned_memory", False), f"{where}, from pageable memory"


def _pinned(values: Tensor) -> Tensor:
    pinned = values.clone()
    pinned.is_in_pinned_memory = True  # type: ignore[attr-defined]
    return pinned


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Within this context everything raises that would make the host wait for `DEVICE`."""
    with mock.patch.object(Tensor, "pin_memory", _pinned), _ChecksCopies():
        yield


class _CudaIsDevice(TorchFunctionMode):
    """megatron-core makes tensors on "cuda"."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": DEVICE}
        return function(*args, **kwargs)


@contextlib.contextmanager
def device_as_cuda() -> Iterator[None]:
    """Within this context, which is inside of the CPU adapter, megatron-core computes on `DEVICE`."""
    with mock.patch.object(torch.cuda, "current_device", lambda: DEVICE), _CudaIsDevice():
        yield


@contextlib.contextmanager
def without_gloo() -> Iterator[None]:
    """Within this context a fake rank can build an optimizer. It uses gloo for checkpoints alone."""
    names = ("get_data_parallel_group_gloo", "get_expert_data_parallel_group_gloo")
    with mock.patch.multiple(parallel_state, **{name: lambda *_, **__: None for name in names}):
        yield


@contextlib.contextmanager
def recorded_reads() -> Iterator[list[str]]:
    """Within this context reading `DEVICE` gives a one, or a list of zeros.

    Yields the names of the functions that read, in order.
    """
    reads: list[str] = []
    values: dict[str, Callable[[Tensor], Any]] = {
        "item": lambda x: 1.0,
        "tolist": lambda x: torch.zeros(x.shape).tolist(),
        "__bool__": lambda x: True,
        "__float__": lambda x: 1.0,
        "__int__": lambda x: 1,
    }
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch.object(Tensor, name, _reading(name, value, reads)))
        yield reads


def _reading(name: str, value: Callable[[Tensor], Any], reads: list[str]) -> Callable[..., Any]:
    real = getattr(Tensor, name)

    def read(self: Tensor) -> Any:
        if self.device != DEVICE:
            return real(self)
        frame = sys._getframe(1)
        while frame.f_code.co_name == "__torch_function__":
            assert frame.f_back is not None
            frame = frame.f_back
        reads.append(frame.f_code.co_name)
        return value(self)

    return read
