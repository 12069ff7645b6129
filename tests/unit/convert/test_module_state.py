"""Transformer Engine's state in a checkpoint is a pickle inside a tensor. It is pickled again or refused.

The recipes are in a module with the name of Transformer Engine's module. They are made as its recipes are:
dataclasses, and an enumeration whose values are named tuples.
"""

import enum
import io
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_post.convert.module_state import UnsafeState, safe_state


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    E4M3 = _FormatHelper(448, 448)
    HYBRID = _FormatHelper(448, 57344)


@dataclass(frozen=True)
class MMParams:
    use_split_accumulator: bool = True


@dataclass
class DelayedScaling:
    fp8_format: Format = Format.HYBRID
    amax_compute_algo: Any = "max"
    fp8_gemm_fprop: MMParams = MMParams(False)


RECIPES = "transformer_engine.common.recipe"


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that pickles call `transformer_engine.common.recipe`."""
    module = ModuleType(RECIPES)
    for found in (_FormatHelper, Format, MMParams, DelayedScaling):
        monkeypatch.setattr(found, "__module__", RECIPES)
        setattr(module, found.__name__, found)
    for parent in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, RECIPES, module)


def _state(**extra: Any) -> dict[str, Any]:
    """The values that `get_extra_state` of Transformer Engine 2.11 collects under delayed scaling."""
    return {
        "recipe": DelayedScaling(),
        "scale_fwd": torch.tensor([1.0, 0.5, 2.0]),
        "amax_history_fwd": torch.arange(12.0).view(4, 3),
        "extra_fp8_variables": {
            "fp8_checkpoint": True,
            "local_recipes": [DelayedScaling(Format.E4M3)],
            **extra,
        },
    }


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


class _Call:
    """An object whose pickle calls `function` with these arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.usefixtures("transformer_engine")
def test_transformer_engines_state_is_pickled_again() -> None:
    """The module's `pickle.loads` returns equal values from bytes that this process made."""
    saved = _bytes(pickle.dumps(_state()))
    made = safe_state(saved)
    found = pickle.loads(made.numpy().tobytes())
    expected = _state()
    for name in ("scale_fwd", "amax_history_fwd"):
        assert torch.equal(found.pop(name), expected.pop(name))
    assert found == expected
    assert found["recipe"].fp8_format is Format.HYBRID


def test_without_transformer_engine_the_state_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is still read through the allow-list, and refused if it refers to anything else."""
    monkeypatch.delitem(sys.modules, RECIPES, raising=False)
    recipe = b"c" + RECIPES.encode() + b"\nFloat8CurrentScaling\n)\x81}Vfp8_dpa\nI01\nsb"
    assert safe_state(_bytes(b"(dVrecipe\n" + recipe + b"s.")).numel() == 0
    with pytest.raises(UnsafeState, match=r"it refers to pathlib\.Path"):
        safe_state(_bytes(b"(dVrecipe\n" + recipe + b"sVx\ncpathlib\nPath\ns."))


def test_plain_values_stay() -> None:
    tensor = torch.tensor(2.5)
    assert safe_state(tensor) is tensor
    empty = torch.empty(0, dtype=torch.uint8)  # no FP8
    assert safe_state(empty) is empty
    for value in (None, 3, {"a": [1.5, ("b", b"c")], 2: {True}}):
        assert safe_state(value) == value


def _poisons(witness: Path) -> dict[str, Any]:
    bomb = _Call(Path.touch, witness)
    legacy = io.BytesIO()
    torch.save(bomb, legacy, _use_new_zipfile_serialization=False)
    storage = _Call(torch.storage._load_from_bytes, legacy.getvalue())
    algorithm = DelayedScaling(amax_compute_algo=Path.touch)
    return {
        "a call": bomb,
        "a call among the variables": _state(x=bomb),
        "a call among a recipe's attributes": DelayedScaling(amax_compute_algo=bomb),
        "a call in a tensor's storage": _state(x=storage),
        "a function as an algorithm": _state() | {"recipe": algorithm},
        "an allowed function as an algorithm": DelayedScaling(
            amax_compute_algo=torch._utils._rebuild_tensor_v2
        ),
        "getattr": _Call(getattr, Path, "touch"),
    }


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("name", _poisons(Path()))
def test_nothing_is_run(tmp_path: Path, name: str) -> None:
    poison = _bytes(pickle.dumps(_poisons(tmp_path / "witness")[name]))
    with pytest.raises(UnsafeState, match="not a state of Transformer Engine"):
        safe_state(poison)
    assert not (tmp_path / "witness").exists()


_RECIPE = b"c" + RECIPES.encode() + b"\n"


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize(
    "stream",
    [
        _RECIPE + b"Format\n(N(dVx\nI1\nstb.",  # setattr(Format, "x", 1)
        _RECIPE + b"DelayedScaling\n(N(dV__init__\nI1\nstb.",
        _RECIPE + b"Format\n(" + _RECIPE + b"_FormatHelper\n(I448\nI448\ntRtR(dV_value_\nI1\nsb.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(N(dV__defaults__\nNstb.",
        b"(lp0\ng0\na.",  # a list that holds itself
        b"\x80\x04\x8e" + b"\xff" * 4 + b"\0\0\0\x10",  # claims 2**60 bytes
    ],
)
def test_no_class_or_function_is_changed(stream: bytes) -> None:
    """A pickle can set attributes of anything that it names."""

    def attributes() -> list[Any]:
        rebuild = torch._utils._rebuild_tensor_v2
        named = [dict(vars(found)) for found in (Format, Format.E4M3, DelayedScaling, rebuild)]
        return [named, rebuild.__defaults__]

    before = attributes()
    with pytest.raises(UnsafeState):
        safe_state(_bytes(stream))
    assert attributes() == before


@pytest.mark.parametrize("value", [io.BytesIO(b"1"), Path(), [object()], torch.nn.Parameter(torch.ones(1))])
def test_other_objects_are_refused(value: Any) -> None:
    """An example is the files that Transformer Engine 1 saved, which its modules pass to `torch.load`."""
    with pytest.raises(UnsafeState, match="an object of type"):
        safe_state(value)
