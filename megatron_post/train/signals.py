"""Signals as a wish to leave, and the exit status that asks a launcher to start the run again."""

import signal
from types import FrameType
from typing import Any, Self

# Of ranks that were asked to stop and have saved, and of ranks that the watchdog ends: sysexits' EX_TEMPFAIL.
# 0 is done, other statuses are failures.
REQUEUE = 75


class Requeue(SystemExit):
    """The run has saved and left because it was asked to; the process ends with `REQUEUE`."""

    def __init__(self) -> None:
        super().__init__(REQUEUE)


class StopRequest:
    """Within this context SIGUSR1 and SIGTERM end nothing: `received` names the first that came."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
