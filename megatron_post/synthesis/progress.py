"""Shows the progress of a run, as a bar on a terminal and otherwise as one line per minute."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from megatron_post.display import make_console, make_progress
from megatron_post.progress import SECONDS_BETWEEN_LINES

_SECONDS_BETWEEN_LOOKS = 0.25


@dataclass(frozen=True)
class Spent:
    """Requests and tokens of this process, without replies that came from the journal."""

    requests: int
    prompt_tokens: int
    tokens: int


class RowProgress:
    """Counts input rows.

    Rates and the remaining time only count new requests, because rows from the journal take almost no time.
    """

    def __init__(self, console: Console, *, who: str, total: int, spent: Callable[[], Spent]) -> None:
        """who: prefix of each line, which names the process. total: number of input rows of this process."""
        self._console, self._who, self._total, self._spent = console, who, total, spent
        self._done = self._dropped = 0
        self._began: tuple[float, int] | None = None  # time of the first answer, and the rows done then
        self._started = time.monotonic()

    def add(self, *, is_dropped: bool) -> None:
        """Count a row. is_dropped: whether it was dropped or failed."""
        self._done += 1
        self._dropped += is_dropped

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Show the progress within this context, and the final state when the context ends."""
        bar = make_progress(
            self._console if self._console.is_terminal else make_console(quiet=True),
            MofNCompleteColumn(),
            TextColumn("rows, {task.fields[text]}", markup=False),
        )
        task = bar.add_task("synthesizing", total=self._total, text="")

        async def look() -> None:
            said = time.monotonic()
            while True:
                bar.update(task, completed=self._done, text=self.text())
                await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
                if not self._console.is_terminal and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    self._print()

        with bar:
            looking = asyncio.create_task(look())
            try:
                yield
            finally:
                looking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await looking
                bar.update(task, completed=self._done, text=self.text())
        self._print()

    def _print(self) -> None:
        line = f"{self._who}{self._done:,} of {self._total:,} rows, {self.text()}"
        self._console.print(line, highlight=False, soft_wrap=True)

    def text(self) -> str:
        """Counts, rates and the time that is left."""
        spent, now = self._spent(), time.monotonic()
        if self._began is None and spent.requests:
            self._began = (now, self._done)
        seconds = max(now - self._started, 1e-9)
        parts = [
            f"{self._dropped:,} dropped or failed",
            f"{spent.requests:,} requests asked",
            f"{spent.tokens / seconds:,.0f} tokens/s",
            f"{spent.prompt_tokens:,} + {spent.tokens:,} tokens spent",
        ]
        if self._began is not None and self._done > self._began[1] and self._done < self._total:
            seconds_a_row = (now - self._began[0]) / (self._done - self._began[1])
            left = int(seconds_a_row * (self._total - self._done))
            parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        return ", ".join(parts)
