"""Makes the state that modules saved beside their tensors safe to give to a module.

Transformer Engine saves the recipe and scales of FP8 as a byte tensor that holds a pickle. Its modules load
the tensor with plain `pickle`, which runs any code that the pickle contains. Here the pickle is read through
an allow-list of names. Each name leads to a stand-in that only records what the pickle would make. The module
receives a new pickle that this process makes from the recorded values, and no byte of the checkpoint.
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
    """State that refers to more than values. Nothing of it was run. The message has the reason."""


def safe_state(value: Any) -> Any:
    """State that may be given to a module. value: an entry that torch's `weights_only` unpickler has read.

    Tensors and plain values stay as they are. A byte tensor is assumed to be Transformer Engine's and is
    pickled again. If Transformer Engine is not loaded, no module reads it, and an empty tensor is returned.

    Raises `UnsafeState` for any other object, and for a byte tensor whose pickle refers to anything but
    recipes and tensors.
    """
    if type(value) is not Tensor or value.dtype != torch.uint8 or not value.numel():
        return _rebuilt(value)
    try:
        state = _rebuilt(_StateUnpickler(io.BytesIO(value.numpy().tobytes())).load())
    except Exception as error:  # a malformed pickle can raise any exception
        raise UnsafeState(
            f"a byte tensor that is not a state of Transformer Engine: {reason_of(error)}"
        ) from error
    if _RECIPES not in sys.modules:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


class _Recorded:
    """An object that a pickle would make: its class, its arguments and its attributes."""

    made_from: tuple[str, str]  # module and name of the class
    arguments: tuple[Any, ...]
    attributes: Any

    def __new__(cls, *arguments: Any) -> "_Recorded":
        recorded = super().__new__(cls)
        recorded.arguments, recorded.attributes = arguments, {}
        return recorded

    def __init__(self, *_: Any) -> None:
        """`__new__` has already recorded the arguments."""

    def __setstate__(self, attributes: Any) -> None:
        self.attributes = attributes


class _StateUnpickler(pickle.Unpickler):
    """Resolves every name to an object of this reader. A pickle can then change no class and no function."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "torch.storage", "_load_from_bytes":
                return lambda content: torch.load(io.BytesIO(content), weights_only=True)
            case "torch._utils", "_rebuild_tensor_v2":
                return lambda *arguments: _rebuild_tensor(*arguments)
            case "collections", "OrderedDict":
                return lambda: {}  # a tensor's hooks
        if (module, name) not in _STATE_CLASSES:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return type(name, (_Recorded,), {"made_from": (module, name)})


def _rebuild_tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """A tensor without hooks and without a gradient."""
    return _rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())


def _rebuilt(value: Any) -> Any:
    """Plain values unchanged, and recorded objects made. Raises `UnsafeState` for anything else.

    If the module of a class is not loaded, the arguments and attributes are checked and None is returned.
    """
    if isinstance(value, _Recorded):
        arguments, attributes = _rebuilt(value.arguments), _rebuilt(value.attributes)
        module, name = value.made_from
        found = getattr(sys.modules.get(module), name, None)
        if not isinstance(attributes, dict):
            raise UnsafeState(f"the attributes of a {name} are a {type(attributes).__name__}")
        if found is None:
            return None
        if attributes and found.__new__ is not object.__new__:
            # an enum's members are shared, so setting their attributes would change them for the whole
            # process
            raise UnsafeState(f"attributes for a {name}, which has none")
        made = found.__new__(found, *arguments)
        if attributes:
            vars(made).update(attributes)
        return made
    if type(value) in (list, tuple, set):
        return type(value)(map(_rebuilt, value))
    if type(value) is dict:
        return {_rebuilt(key): _rebuilt(item) for key, item in value.items()}
    if value is None or type(value) in (bool, int, float, complex, str, bytes, Tensor, torch.Size):
        return value
    raise UnsafeState(f"an object of type {type(value).__module__}.{type(value).__qualname__}")
