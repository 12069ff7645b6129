"""A device whose results the host cannot read, to find the places where the host would wait for a GPU.

It is torch's meta device, whose tensors have no values. Everything that reads them raises, such as `item`,
`tolist`, `bool` and operations whose output depends on values. Copies do not raise, so they are checked here.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")


class _ChecksCopies(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = function(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if any(x.device == DEVICE for x in inputs + outputs):
            for x in inputs:
                # An operation may have a number as an operand, which it gets as a tensor without dimensions.
                if x.device != DEVICE and x.dim():
                    _check_copy(function, x, kwargs)
        return result


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
