"""Runs a function on real gloo ranks, each a process of its own."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

# The server imports the heavy modules once; ranks fork from it in milliseconds. It never runs an operation
# itself.
_PRELOAD = [
    "torch",
    "megatron.core",
    "megatron_post.train.step",
    "megatron_post.models.build",
    "megatron_post.train.optimizer",
    "megatron_post.train.run",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """`function(*args)` on `world_size` processes with torchrun's environment. Returns their results by rank.

    Raises `AssertionError` with the rank's traceback where one fails, or does not end within `timeout`
    seconds.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    queue = _context.Queue()
    ranks = [
        _context.Process(target=_rank_main, args=(queue, function, rank, world_size, port, args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            rank, error, value = queue.get(timeout=timeout)
            assert error is None, f"rank {rank} of {world_size} failed:\n{error}"
            results[rank] = value
    finally:
        for process in ranks:
            process.join(timeout=10 if len(results) == world_size else 0)
            process.kill()
    return [results[rank] for rank in range(world_size)]


def _rank_main(
    queue: Any, function: Callable[..., Any], rank: int, world_size: int, port: int, args: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    try:
        queue.put((rank, None, function(*args)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
