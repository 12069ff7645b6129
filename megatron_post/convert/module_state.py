"""What modules keep beside their tensors in a checkpoint, made safe before a module gets it.

Transformer Engine keeps FP8's recipe and scales as a byte tensor that holds a pickle, and its modules load
that with plain `pickle`, which runs whatever it says. Here such a tensor is read through an allow-list of
names, each of which leads to a stand-in that only records what the pickle wants to make. The module gets a
pickle that this process has made of the recorded values, and no byte of the checkpoint.
"""

import io
import pickle
import sys
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from megatron_post.convert.torch_file import reason_of

_RECIPES = "transformer_engine.common.recipe"
_STATE_CLASSES = {
    *(
        (_RECIPES, name)
        for name in (
            "DelayedScaling",
            "Float8BlockScaling",
            "Float8CurrentScaling",
            "Format",
            "MMParams",
            "MXFP8BlockScaling",
            "NVFP4BlockScaling",
            "QParams",
            "_FormatHelper",
        )
    ),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
}


class UnsafeState(ValueError):
    """State that asks for more than values; nothing of it was run. The message has the reason."""


def safe_state(value: Any) -> Any:
    """The state that may be given to a module, of an entry that torch's `weights_only` unpickler has read.

    Tensors and plain values stay what they are. A byte tensor is taken for Transformer Engine's and is made
    anew; where Transformer Engine is not loaded, no module reads it, and it comes back empty.

    Raises `UnsafeState` for any other object, and for a byte tensor whose pickle names anything but recipes
    and tensors.
    """
    if type(value) is not Tensor or value.dtype != torch.uint8 or not value.numel():
        return _made(value)
    try:
        state = _made(_StateUnpickler(io.BytesIO(value.numpy().tobytes())).load())
    except Exception as error:  # a pickle that is no pickle can make its reader stumble over anything
        raise UnsafeState(
            f"a byte tensor that is no state of Transformer Engine's: {reason_of(error)}"
        ) from error
    if _RECIPES not in sys.modules:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


class _Recorded:
    """An object that a pickle wants to make: of which class, from which arguments, with which attributes."""

    of: tuple[str, str]
    arguments: tuple[Any, ...]
    attributes: Any

    def __new__(cls, *arguments: Any) -> "_Recorded":
        recorded = super().__new__(cls)
        recorded.arguments, recorded.attributes = arguments, {}
        return recorded

    def __init__(self, *_: Any) -> None:
        """The arguments are recorded already."""

    def __setstate__(self, attributes: Any) -> None:
        self.attributes = attributes


class _StateUnpickler(pickle.Unpickler):
    """Every name leads to an object of this reader alone: a pickle can change no class and no function."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "torch.storage", "_load_from_bytes":
                return lambda content: torch.load(io.BytesIO(content), weights_only=True)
            case "torch._utils", "_rebuild_tensor_v2":
                return lambda *arguments: _rebuild_tensor(*arguments)
            case "collections", "OrderedDict":
                return lambda: {}  # of a tensor's hooks
        if (module, name) not in _STATE_CLASSES:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return type(name, (_Recorded,), {"of": (module, name)})


def _rebuild_tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """Without hooks, and without a gradient."""
    return _rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())


def _made(value: Any) -> Any:
    """Plain values as they are, recorded objects made. Raises `UnsafeState` for anything else.

    Where the module of a class is not loaded, the arguments and attributes are checked, and None is returned.
    """
    if isinstance(value, _Recorded):
        arguments, attributes = _made(value.arguments), _made(value.attributes)
        module, name = value.of
        found = getattr(sys.modules.get(module), name, None)
        if not isinstance(attributes, dict):
            raise UnsafeState(f"the attributes of a {name} are a {type(attributes).__name__}")
        if found is None:
            return None
        if attributes and found.__new__ is not object.__new__:
            raise UnsafeState(f"attributes for a {name}, which has none")  # an enum's member is shared
        made = found.__new__(found, *arguments)
        if attributes:
            vars(made).update(attributes)
        return made
    if type(value) in (list, tuple, set):
        return type(value)(map(_made, value))
    if type(value) is dict:
        return {_made(key): _made(item) for key, item in value.items()}
    if value is None or type(value) in (bool, int, float, complex, str, bytes, Tensor, torch.Size):
        return value
    raise UnsafeState(f"an object of type {type(value).__module__}.{type(value).__qualname__}")
