"""Coordinates the ranks of one step that generate in parallel, each with its own copy of the model."""

import os
import time
from collections.abc import Callable

import torch
from rich.console import Console

from megatron_post.inference.settings import BackendSettings, TransformersBackend, gpus_of
from megatron_post.parallel.environment import rank_from_environment
from megatron_post.progress import SECONDS_BETWEEN_LINES

_SECONDS_BETWEEN_LOOKS = 0.5  # between checks of a shared file system


def rank_prefix() -> str:
    """The beginning of a printed line if there are several ranks."""
    rank, size, _ = rank_from_environment()
    return f"rank {rank} of {size}: " if size > 1 else ""


def wait_until(done: Callable[[], bool], what: str, console: Console) -> None:
    """Wait until another rank of this step has done something. what: names it in messages.

    The launcher ends all ranks if one fails. Raises `ValueError` if the launcher itself has ended.
    """
    parent, printed = os.getppid(), time.monotonic()
    while not done():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if os.getppid() != parent:
            raise ValueError(f"what started this rank is gone, while it waited for {what}")
        if time.monotonic() - printed >= SECONDS_BETWEEN_LINES:
            printed = time.monotonic()
            console.print(f"{rank_prefix()}waiting for {what}", highlight=False, soft_wrap=True)


def take_gpus(backend: BackendSettings) -> None:
    """Restrict this rank to its own GPUs if several ranks generate on one node.

    Call it once per process, before CUDA is initialised. Raises `ValueError` if there are too few GPUs.
    """
    _, size, local_rank = rank_from_environment()
    count = gpus_of(backend)
    # device_count uses NVML. is_available would initialise CUDA, and after that no variable can change which
    # GPUs are visible.
    if size == 1 or count == 0 or torch.cuda.device_count() == 0:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    own = devices[local_rank * count : (local_rank + 1) * count]
    if len(own) < count:
        raise ValueError(
            f"rank {local_rank} of this node would draw on GPUs {local_rank * count} to "
            f"{(local_rank + 1) * count - 1}, and sees {len(devices)}: let every rank see all GPUs of its "
            "node, and have no more ranks on it (generate.copies, ranks_per_node) than these hold"
        )
    if isinstance(backend, TransformersBackend):
        torch.cuda.set_device(local_rank)
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # vLLM's processes use a store of their own
