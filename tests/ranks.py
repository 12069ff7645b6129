"""Runs a function on real gloo ranks, each in its own process."""

import multiprocessing
import multiprocessing.forkserver
import os
import traceback
from collections.abc import Callable
from multiprocessing.forkserver import ForkServer
from typing import Any
from unittest import mock

from torch.distributed import TCPStore

# The server imports the heavy modules once, and ranks fork from it in milliseconds. It never runs an
# operation itself, because threads of an operation would not survive the fork.
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


def server_with(*modules: str) -> ForkServer:
    """Another fork server, for tests whose processes must import something before the modules above."""
    server = ForkServer()
    server.set_forkserver_preload(list(modules))
    return server


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 300.0,
    server: ForkServer | None = None,
) -> list[Any]:
    """Run `function(*args)` on `world_size` processes with torchrun's environment. Returns results by rank.

    server: the process that ranks fork from, by default one that has imported the modules above. Raises
    `AssertionError` with the rank's traceback if a rank fails, or `queue.Empty` if none answers for `timeout`
    seconds.
    """
    # This process serves the ranks' store. If it chose a free port for rank 0 instead, another process could
    # take the port before rank 0 listens.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    queue = _context.Queue()
    ranks = [
        _context.Process(target=_rank_main, args=(queue, function, rank, world_size, store.port, args))
        for rank in range(world_size)
    ]
    connect = (server or multiprocessing.forkserver._forkserver).connect_to_new_process
    # The module has one server for all contexts, and no argument to choose another one.
    with mock.patch.object(multiprocessing.forkserver, "connect_to_new_process", connect):
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
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    import torch

    torch.set_num_threads(1)
    try:
        queue.put((rank, None, function(*args)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
