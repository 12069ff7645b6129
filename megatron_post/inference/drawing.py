"""Generates one process's share of the responses and appends them to its journal."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from megatron_post.inference.backend import Backend
from megatron_post.inference.failures import check_failures
from megatron_post.inference.journal import Journal
from megatron_post.inference.model import answer_in, entry_of
from megatron_post.inference.ranks import rank_prefix
from megatron_post.inference.request import Refusal, Reply
from megatron_post.inference.samples import Draw
from megatron_post.inference.server import Server
from megatron_post.inference.settings import ServerBackend
from megatron_post.progress import WorkProgress


@dataclass
class Share:
    """The state of one process's share.

    num_prompts: the prompts of all shares. max_failed: the share of them that may fail.
    """

    journal: Journal
    num_prompts: int
    max_failed: float
    failures: list[dict[str, Any]] = field(default_factory=list)
    written: int = 0
    tokens: int = 0

    def missing(self, draws: Iterable[Draw]) -> list[int]:
        """The prompt of each draw without an answer. Refusals among the answers are added to the failures."""
        prompts = []
        for draw in draws:
            if (entry := self.journal.get(draw.key)) is None:
                prompts.append(draw.prompt)
            elif isinstance(answer := answer_in(entry, draw.key), Refusal):
                self.failures.append(draw.row(answer))
        return prompts

    def keep(self, draw: Draw, answer: Reply | Refusal) -> None:
        """Append an answer to the journal.

        Raises `TooManyFailures` if there are too many refusals. The last refusal is then not recorded, so
        that its request is sent again after the user has mended the server or the model.
        """
        if draw.key in self.journal:
            return
        if isinstance(answer, Refusal):
            self.failures.append(draw.row(answer))
            check_failures(self.failures, prompts=self.num_prompts, max_failed=self.max_failed)
        else:
            self.written, self.tokens = self.written + 1, self.tokens + answer.tokens
        self.journal.append(draw.key, *entry_of(draw.request, answer))


Advance = Callable[[int], None]  # a function that is called with the number of prompts that are newly done


def draw_in_process(
    backend: Backend, parts: Iterable[Sequence[Draw]], share: Share, advance: Advance
) -> None:
    """Generate every part with a missing answer as a whole.

    Batches of another width round differently and may give other responses. So an interrupted part would
    differ from that of an undisturbed run if only the missing answers were generated.
    """
    for part in parts:
        for draw, answer in zip(part, backend.respond([draw.request for draw in part]), strict=True):
            share.keep(draw, answer)
        advance(len({draw.prompt for draw in part}))


async def draw_from_servers(
    settings: ServerBackend, draws: Iterable[Draw], left: Counter[int], share: Share, advance: Advance
) -> None:
    """Request the missing answers, as many at a time as the servers accept, and record each as it arrives.

    left: the number of missing responses of each prompt.
    """
    waiting = (draw for draw in draws if draw.key not in share.journal)
    async with Server(settings) as server:

        async def work() -> None:
            for draw in waiting:
                share.keep(draw, await server.answer(draw.request))
                left[draw.prompt] -= 1
                advance(left[draw.prompt] == 0)

        workers = [asyncio.create_task(work()) for _ in range(min(settings.most_in_flight, left.total()))]
        try:
            await asyncio.gather(*workers)
        finally:  # the first error cancels all other requests
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


class ShareProgress(WorkProgress):
    """Shows the prompts of this process, with the rate of tokens."""

    def __init__(self, console: Console, share: Share, done: int, total: int) -> None:
        """done, total: numbers of prompts of this process."""
        self._share = share
        what = f"{rank_prefix()}generating"
        super().__init__(
            what, total=total, done=done, unit="prompts", console=console, detail=lambda: self.rate
        )

    @property
    def rate(self) -> str:
        return f"{self._share.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
