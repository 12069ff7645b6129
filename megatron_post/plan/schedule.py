"""Simulates the pipeline schedules of megatron-core 0.16: the order and the times of all passes.

Without virtual stages the schedule is 1F1B (`forward_backward_pipelining_without_interleaving`): rank r of p
warms up with p - r - 1 forward passes, and then alternates. With v chunks on each rank it is the interleaved
schedule. Its warm-up has 2 (p - r - 1) + (v - 1) p passes, and the chunk changes every p microbatches.

The order of passes on a rank is exactly megatron-core's. Each pass starts when the passes that it waits for
have ended. With equal passes and free transfers, the ideal time of a rank is m v (f + b), and a rank is idle
for (p - 1) / (v m + p - 1) of the time (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward"]


class Pass(NamedTuple):
    """One microbatch through one model chunk of one rank."""

    kind: Kind
    microbatch: int
    chunk: int


@dataclass(frozen=True)
class Event:
    """A pass and its times, in seconds from the start of the step."""

    rank: int
    task: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """All passes of a step. The events of a rank are in the order in which it computes them."""

    pipeline: int
    events: tuple[Event, ...]

    @property
    def seconds(self) -> float:
        return max(event.end for event in self.events)

    def busy(self, rank: int) -> float:
        """Seconds in which a rank computes."""
        return self._busy[rank]

    @cached_property
    def _busy(self) -> list[float]:
        seconds = [0.0] * self.pipeline
        for event in self.events:
            seconds[event.rank] += event.end - event.start
        return seconds

    @property
    def bubble(self) -> float:
        """Share of the ranks' time, from 0 to 1, in which they compute nothing."""
        busy = sum(self.busy(rank) for rank in range(self.pipeline))
        return 1 - busy / (self.pipeline * self.seconds)


def rank_order(
    rank: int, *, pipeline: int, virtual: int, microbatches: int, forward_only: bool = False
) -> list[Pass]:
    """The passes of a pipeline rank in megatron-core's order.

    Raises `ValueError` if the interleaved schedule cannot run, because it takes microbatches in groups of
    `pipeline`.
    """
    if virtual > 1 and microbatches % pipeline:
        raise ValueError(
            f"{microbatches} microbatches are not a multiple of parallel.pipeline={pipeline}, which the "
            "interleaved schedule needs; change train.global_batch or parallel.virtual_pipeline"
        )
    total = microbatches * virtual
    warmup = pipeline - rank - 1
    if virtual > 1:
        warmup = 2 * warmup + (virtual - 1) * pipeline
    warmup = min(warmup, total)
    size = pipeline if virtual > 1 else microbatches
    groups = [range(first, first + size) for first in range(0, microbatches, size)]
    table = [(m, chunk) for group in groups for chunk in range(virtual) for m in group]
    forward = [Pass("forward", m, chunk) for m, chunk in table]
    if forward_only:
        return forward
    backward = [Pass("backward", m, virtual - 1 - chunk) for m, chunk in table]
    steady = [item for pair in zip(forward[warmup:], backward, strict=False) for item in pair]
    return forward[:warmup] + steady + backward[total - warmup :]


def simulate(
    seconds: Callable[[int, Pass], float],
    *,
    pipeline: int,
    virtual: int,
    microbatches: int,
    transfer: float = 0.0,
    forward_only: bool = False,
) -> Timeline:
    """The times of every pass of a step.

    seconds(rank, pass): the duration of a pass, which may depend on its stage (embedding, loss) and its pack.
    transfer: seconds until another rank can use the result of a pass. forward_only: run forward passes only,
    as a frozen reference does.
    """
    shape = {"pipeline": pipeline, "virtual": virtual, "microbatches": microbatches}
    orders = [rank_order(rank, **shape, forward_only=forward_only) for rank in range(pipeline)]
    last = pipeline * virtual - 1
    ended: dict[tuple[Kind, int, int], float] = {}  # (kind, microbatch, stage) -> time
    clocks, positions, events = [0.0] * pipeline, [0] * pipeline, []
    waiting = True
    while waiting:
        waiting, moved = False, False
        for rank, order in enumerate(orders):
            while positions[rank] < len(order):
                task = order[positions[rank]]
                stage = task.chunk * pipeline + rank
                ready = _ready(task, stage, last, ended, transfer)
                if ready is None:
                    waiting = True
                    break
                start = max(clocks[rank], ready)
                clocks[rank] = start + seconds(rank, task)
                ended[task.kind, task.microbatch, stage] = clocks[rank]
                events.append(Event(rank, task, start, clocks[rank]))
                positions[rank] += 1
                moved = True
        assert moved or not waiting, "the schedule's order never deadlocks"
    return Timeline(pipeline, tuple(events))


def _ready(
    task: Pass, stage: int, last: int, ended: dict[tuple[Kind, int, int], float], transfer: float
) -> float | None:
    """The time at which a pass's input is ready, or None while it is unknown.

    stage: in the model's order. last: the last stage.
    """
    if task.kind == "forward":
        if stage == 0:
            return 0.0
        before = ended.get(("forward", task.microbatch, stage - 1))
        return None if before is None else before + transfer
    if stage == last:
        return ended.get(("forward", task.microbatch, stage))
    after = ended.get(("backward", task.microbatch, stage + 1))
    return None if after is None else after + transfer
