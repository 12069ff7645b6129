"""Selects the implementation of an operation: Triton kernels or plain torch."""

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["auto", "triton", "torch"]


def resolve(impl: Implementation, tensor: Tensor) -> Literal["triton", "torch"]:
    """The implementation for operations on `tensor`. "auto" selects Triton on CUDA and torch elsewhere.

    Kernels accumulate in fp32, so "auto" selects torch for float64. On the CPU kernels run only in Triton's
    interpreter, which needs a process that was started with TRITON_INTERPRET=1.
    Raises `ValueError` for an unknown `impl`, and for "triton" if it cannot run.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl={impl!r}: choose "auto", "triton" or "torch"')
    if impl == "torch":
        return "torch"
    obstacle = _obstacle(tensor)
    if obstacle is None:
        on_cpu = not tensor.is_cuda
        return "torch" if impl == "auto" and on_cpu else "triton"
    if impl == "triton":
        raise ValueError(f'impl="triton" cannot run: {obstacle}; choose "auto" or "torch"')
    return "torch"


def _obstacle(tensor: Tensor) -> str | None:
    if tensor.dtype == torch.float64:
        return "kernels accumulate in fp32 and the tensor is float64"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensor is on {tensor.device}, and Triton runs there only under TRITON_INTERPRET=1"
    return None
