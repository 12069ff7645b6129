"""Signals that ask a run to stop, and the exit status that asks the launcher to start it again."""

import signal
import threading
from types import FrameType
from typing import Any, Self

# The exit status of ranks that were asked to stop and have saved, and of ranks that the watchdog ends. It is
# EX_TEMPFAIL of sysexits.h. Status 0 means that the run has finished, and any other status is a failure.
REQUEUE = 75


class Requeue(SystemExit):
    """The run was asked to stop and has saved. The process ends with the status `REQUEUE`."""

    def __init__(self) -> None:
        super().__init__(REQUEUE)


class StopRequest:
    """Within this context SIGUSR1 and SIGTERM do not end the process. `received` names the first signal."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("training runs in the main thread only, because Python handles signals there")
        for number in (signal.SIGUSR1, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        # Only a flag is set. The step must be finished, because other ranks wait in its collectives.
        self.received = self.received or signal.Signals(number).name
