"""Signals as a wish to leave, and the exit statuses that a launcher reads."""

import signal
from types import FrameType
from typing import Any, Self

# What a launcher does with a rank's exit status: 0 is done, these two are requeued, others have failed.
REQUEUE = 75  # sysexits' EX_TEMPFAIL: all is saved
HUNG = 76  # ended by the watchdog; other ranks may be unable to end themselves


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
