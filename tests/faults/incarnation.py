"""One start of a run. Its real ranks run the command line, and fork from a server that has imported it."""

import contextlib
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tests.ranks  # noqa: F401  what the server imports

_context = multiprocessing.get_context("forkserver")
Inject = Callable[[], None]


def _free_port() -> int:
    """A loopback port for rank 0, below those that the kernel gives to connections in the meantime."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", random.SystemRandom().randrange(10_000, 23_000)))
            return int(listener.getsockname()[1])


class Incarnation:
    """`megatron-post train CONFIG` on ranks, as srun would start it. Output goes to `log`.

    inject: a module-level function that each rank calls first. It can read its rank from the environment.
    """

    def __init__(
        self,
        config: Path,
        *overrides: str,
        log: Path,
        ranks: int = 2,
        name: str = "",
        inject: Inject | None = None,
    ) -> None:
        self.log = log
        log.touch()
        port = _free_port()
        self.began = time.monotonic()
        self.ranks = [
            _context.Process(
                target=_main, args=(rank, ranks, port, name, str(config), overrides, str(log), inject)
            )
            for rank in range(ranks)
        ]
        for rank in self.ranks:
            rank.start()

    @property
    def output(self) -> str:
        """The output of this incarnation so far."""
        return self.log.read_text(errors="replace")

    @property
    def step(self) -> int:
        """The last step that it has printed."""
        return max((int(text) for text in re.findall(r"^step +(\d+)/", self.output, re.M)), default=0)

    @property
    def resumed(self) -> int:
        """The step from which it resumed, or 0."""
        return int((re.findall(r"resumed after step (\d+)", self.output) or ["0"])[0])

    @property
    def alive(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    def until(self, is_true: Callable[[], Any], *, timeout: float = 120) -> None:
        """Wait until `is_true()`. Raises `AssertionError` after `timeout` seconds or if a rank ends."""
        deadline = time.monotonic() + timeout
        while not is_true():
            assert all(rank.is_alive() for rank in self.ranks), f"a rank has ended:\n{self.output}"
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def wait(self, *, timeout: float = 240) -> list[int | None]:
        """Wait for the exit statuses by rank, negative for signals.

        Raises `AssertionError` if a rank hangs.
        """
        deadline = time.monotonic() + timeout
        for rank in self.ranks:
            rank.join(timeout=max(0.0, deadline - time.monotonic()))
        if self.alive:
            self.kill()
            raise AssertionError(f"no end within {timeout} s:\n{self.output}")
        return [rank.exitcode for rank in self.ranks]

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.ranks)):
            pid = self.ranks[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def kill(self) -> None:
        """Kill the remaining ranks with SIGKILL, as a launcher does when one rank has died."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()


def _main(
    rank: int,
    world_size: int,
    port: int,
    name: str,
    config: str,
    overrides: tuple[str, ...],
    log: str,
    inject: Inject | None,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "MEGATRON_POST_INCARNATION": name,
    }
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["megatron-post", "train", config, *overrides]
    import torch

    from megatron_post import cli

    torch.set_num_threads(1)
    if inject is not None:
        inject()
    cli.main()
