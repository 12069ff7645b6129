"""A side of a comparison is a process of its own that runs one round of steps for each request."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_post.bench.trl.workload import Workload


@dataclass(frozen=True)
class Input:
    """A side's data.

    fill: the share of its batches that is real tokens. collated_per_second: real tokens per second that
    become tensors, on one core.
    """

    fill: float
    collated_per_second: float


@dataclass(frozen=True)
class Round:
    """One round of optimizer steps: wall seconds, real tokens, tokens with loss, and the last step's loss."""

    seconds: float
    tokens: int
    trained: int
    loss: float


Side = Callable[[Workload, "Gate"], None]


class Gate:
    """The side's end of the pipe.

    `ready`, and `step` after the last optimizer step of a round, wait until the next round is requested. They
    return False when no more rounds are needed.
    """

    def __init__(self, connection: Connection, steps_per_round: int) -> None:
        self._connection, self._steps_per_round = connection, steps_per_round
        self._steps = self._tokens = self._trained = 0
        self._started = 0.0

    def ready(self, prepared: Input) -> bool:
        self._connection.send(prepared)
        return self._wait()

    def step(self, *, tokens: int, trained: int, loss: float) -> bool:
        self._steps, self._tokens, self._trained = (
            self._steps + 1,
            self._tokens + tokens,
            self._trained + trained,
        )
        if self._steps < self._steps_per_round:
            return True
        seconds = time.perf_counter() - self._started
        self._connection.send(Round(seconds, self._tokens, self._trained, loss))
        self._steps = self._tokens = self._trained = 0
        return self._wait()

    def _wait(self) -> bool:
        wanted = self._connection.recv()
        self._started = time.perf_counter()
        return wanted


def interleave(
    sides: dict[str, Side],
    workload: Workload,
    *,
    rounds: int,
    progress: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, Input], dict[str, list[Round]]]:
    """Run `rounds` rounds of every side in turn: A B A B. A first round of each warms up and is not counted.

    Only one side computes at a time, so a slow minute of the machine affects all of them. Raises
    `RuntimeError` with the traceback of a side that fails.
    """
    # Each side has a process of its own, so that its threads, patches and caches do not affect the other
    # sides.
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    try:
        inputs = {}
        for name, side in sides.items():
            pipes[name], child_end = context.Pipe()
            processes.append(context.Process(target=_serve, args=(side, workload, child_end), daemon=True))
            processes[-1].start()
            child_end.close()
            inputs[name] = _receive(name, pipes[name])
        results: dict[str, list[Round]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name, pipe in pipes.items():
                pipe.send(True)
                result = _receive(name, pipe)
                if number:
                    results[name].append(result)
                progress()
        for pipe in pipes.values():
            pipe.send(False)
        for process in processes:
            process.join(timeout=30)
        return inputs, results
    finally:
        for process in processes:
            process.kill()


def _serve(side: Side, workload: Workload, connection: Connection) -> None:
    import torch

    # The output of libraries would spoil the table. Errors are sent through the pipe.
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    torch.set_num_threads(workload.threads)
    try:
        side(workload, Gate(connection, workload.steps_per_round))
    except BaseException:
        connection.send(traceback.format_exc())


def _receive(name: str, pipe: Connection) -> Any:
    message = pipe.recv()
    if isinstance(message, str):
        raise RuntimeError(f"{name} failed:\n{message}")
    return message
