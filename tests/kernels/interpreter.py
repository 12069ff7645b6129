"""Runs a test of Triton kernels on the GPU, or else in a process with Triton's interpreter.

`TRITON_INTERPRET=1` takes effect when Triton is imported and when a kernel is decorated. A kernel that was
decorated with it cannot be compiled. So the process of the tests never sets it, and compiles for GPUs
(tests/kernels/compiling.py). Tests under `@on_kernels` run in one child process. It is spawned at the first
such test, and sets the variable before it imports torch or Triton. Ranks that such a test starts
(tests/ranks.py) inherit the variable, because the child has its own fork server.
"""

import functools
import importlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def on_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """Run the test on a GPU if there is one, or else in the interpreter's process.

    The test's arguments (from `parametrize`) must be picklable. A failure keeps its own traceback.
    """

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        if kernel_device() == "cuda" or "TRITON_INTERPRET" in os.environ:
            test(**arguments)
        else:
            _interpreter().submit(_run, test.__module__, test.__name__, arguments).result()

    return run


def kernel_device() -> str:
    """The device for the tensors of a test under `@on_kernels`."""
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
