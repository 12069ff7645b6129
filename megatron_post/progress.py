"""Shows how long work lasts, with its rate and the time that is left.

A terminal gets a bar. A log gets one line a minute, and nothing from work that is shorter.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import TextColumn

from megatron_post.display import make_console, make_progress

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 60.0


class WorkProgress:
    """A context manager that shows one piece of work while it runs.

    what: begins the line. total: of all work, or None if it is unknown. Then there is no remaining time.
    is_estimate: the total is not exact. done: the part of the work that an earlier call has done. The rate
    and the remaining time only count what is done from now on. detail: more text for the line.
    """

    def __init__(
        self,
        what: str,
        *,
        total: float | None,
        unit: str,
        console: Console,
        is_estimate: bool = False,
        done: float = 0,
        detail: Callable[[], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._unit, self._console, self._clock = what, unit, console, clock
        self._total, self._is_estimate, self._detail = total, is_estimate, detail
        self._done = self._before = done
        self._started = self._printed = clock()
        self._bar = make_progress(
            console if console.is_terminal else make_console(quiet=True),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self._task = self._bar.add_task(what, total=total, completed=int(done), text=self.text())

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return self._clock() - self._started

    def advance(self, count: float = 1) -> None:
        """Count more finished work."""
        self.reach(self._done + count)

    def reach(self, done: float) -> None:
        """Set how much work is finished, what an earlier call has done included."""
        self._done = done
        self._bar.update(self._task, completed=done, text=self.text())
        if not self._console.is_terminal and self._clock() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = self._clock()
            self._console.print(f"{self._what}: {self.text()}", highlight=False, soft_wrap=True)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count each of them when the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    def text(self) -> str:
        """The finished part, its rate, the time that is left, and the details."""
        done, total = self._done, self._total
        of = "" if total is None else f" of {'about ' * self._is_estimate}{_figure(total)}"
        parts = [f"{_figure(done)}{of} {self._unit}"]
        new, seconds = done - self._before, self.seconds
        if new > 0 and seconds > 0:
            rate = new / seconds
            parts.append(f"{rate:,.{0 if rate >= 10 else 1}f} {self._unit}/s")
            if total is not None and done < total:
                left = round((total - done) / rate)
                parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        if self._detail is not None:
            parts.append(self._detail())
        return ", ".join(parts)


def _figure(count: float) -> str:
    return f"{count:,}" if isinstance(count, int) else f"{count:,.1f}"
