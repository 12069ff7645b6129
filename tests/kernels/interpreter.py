"""Runs a test of Triton kernels on the GPU, or else in a process that has Triton's interpreter.

`TRITON_INTERPRET=1` counts when Triton is imported and when a kernel is decorated, and what was decorated
under it can no longer be compiled. So the process of the tests never sets it, and compiles for GPUs
(tests/kernels/compiling.py). A test under `@on_kernels` runs in one child, spawned at the first such test,
that sets the variable before it imports torch or Triton. Ranks that such a test starts (tests/ranks.py)
inherit the variable, as the child has a fork server of its own.
"""

import functools
import importlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def on_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """The test, run on the GPU where there is one, else in the interpreter's process.

    Arguments of the test (from `parametrize`) must be picklable; a failure arrives with its own traceback.
    """

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        if kernel_device() == "cuda" or "TRITON_INTERPRET" in os.environ:
            test(**arguments)
        else:
            _interpreter().submit(_run, test.__module__, test.__name__, arguments).result()

    return run


def kernel_device() -> str:
    """Where the tensors of a test under `@on_kernels` belong."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def _interpreter() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_interpret)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)


def _run(module: str, name: str, arguments: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), name)(**arguments)
