"""Records what a rank is doing and how long each section of a step takes, and finds slow ranks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# A rank is slow if its own work takes this many times as long as the median rank's, over a window of steps.
SLOW = 1.5
WINDOW = 20


@dataclass
class Period:
    """Work that has a deadline: a step, an evaluation or a save. since: its start by `time.monotonic`."""

    step: int
    section: str
    patience: float
    since: float = field(default_factory=time.monotonic)


class Heartbeat:
    """A rank's current period and section, which the watchdog reads, and the duration of its sections."""

    def __init__(self, device: torch.device) -> None:
        self.period: Period | None = None
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def begin(self, step: int, section: str, *, patience: float = 1.0) -> None:
        """Begin a new period. It may take `patience` times as long as a step."""
        self.period = Period(step, section, patience)
        self._marks = [(section, self._now())]

    def enter(self, section: str) -> None:
        """Begin another section of the current period."""
        if self.period is not None:
            self.period.section = section
            self._marks.append((section, self._now()))

    def entering(self, section: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` so that every call of it enters a section."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(section)
            return function(*args, **kwargs)

        return call

    def end(self) -> None:
        """End the period. No deadline applies until the next `begin`."""
        self.period = None

    def seconds(self) -> dict[str, float]:
        """Seconds of each finished section of this period. On a GPU this is the time that the GPU took.

        The caller must first have waited for the GPU, because the events have no times before it reaches
        them.
        """
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        return {name: self._between(start, end) for (name, start), (_, end) in pairs}

    def _now(self) -> Any:
        return torch.cuda.current_stream().record_event(_event()) if self._on_gpu else time.perf_counter()

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self._on_gpu else end - start


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class Stragglers:
    """Sums the seconds of every rank's own work over windows of `WINDOW` steps. Waiting does not count."""

    def __init__(self, world_size: int) -> None:
        self._sums, self._steps = [0.0] * world_size, 0

    def add(self, seconds: Sequence[float]) -> str | None:
        """Add the seconds of one step by rank.

        A window's last call returns a line about slow ranks, if any.
        """
        self._sums = [total + own for total, own in zip(self._sums, seconds, strict=True)]
        self._steps += 1
        if self._steps < WINDOW:
            return None
        means = [total / WINDOW for total in self._sums]
        self._sums, self._steps = [0.0] * len(means), 0
        # This is the lower median. Of two ranks it is the faster one, so that the slower one can be named.
        middle = sorted(means)[(len(means) - 1) // 2]
        slow = [f"rank {rank} ({mean:.3f} s)" for rank, mean in enumerate(means) if mean > SLOW * middle]
        if not slow:
            return None
        named = ", ".join(slow)
        return f"slow over {WINDOW} steps: {named}. The median rank's own work takes {middle:.3f} s"
