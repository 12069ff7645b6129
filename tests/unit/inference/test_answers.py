"""A model in this process answers many callers, each of which waits for one answer."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_post.inference.answers import Batches, open_answers
from megatron_post.inference.request import Refusal, Reply, Request, Sampling
from megatron_post.inference.settings import TransformersBackend
from tests.unit.inference.asking import answer, asking
from tests.unit.rounds.models import tiny_policy


class Slow:
    """Answers with the request when it is released. It refuses the text "no" and fails at "fail"."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.may = threading.Event()

    def close(self) -> None:
        pass

    def respond(self, requests: Sequence[Request]) -> list[Reply | Refusal]:
        texts = [request.messages[-1].content for request in requests]
        self.batches.append(texts)
        assert self.may.wait(10)
        if "fail" in texts:
            raise ValueError("no engine")
        return [Refusal("no") if text == "no" else answer(text) for text in texts]


def test_requests_gather_while_others_are_answered() -> None:
    """Requests that are sent together are a batch, and those that arrive during it are the next batch."""
    backend = Slow()

    async def main() -> list[Reply | Refusal]:
        batches = Batches(backend)
        first = [asyncio.ensure_future(batches.answer(asking(text))) for text in ("a", "no")]
        while not backend.batches:
            await asyncio.sleep(0.01)
        later = [asyncio.ensure_future(batches.answer(asking(text))) for text in ("b", "c", "d")]
        await asyncio.sleep(0)
        later[1].cancel()  # a caller that is cancelled
        backend.may.set()
        return list(await asyncio.gather(*first, later[0], later[2]))

    assert asyncio.run(main()) == [answer("a"), Refusal("no"), answer("b"), answer("d")]
    assert backend.batches == [["a", "no"], ["b", "d"]]


def test_an_error_reaches_everybody_who_waits_and_nobody_later() -> None:
    backend = Slow()
    backend.may.set()

    async def main() -> list[object]:
        batches = Batches(backend)
        asked = [batches.answer(asking(text)) for text in ("a", "fail")]
        failed = await asyncio.gather(*asked, return_exceptions=True)
        return [*map(str, failed), await batches.answer(asking("b"))]

    assert asyncio.run(main()) == ["no engine", "no engine", answer("b")]


def test_it_ends_behind_its_last_batch() -> None:
    """A model is not freed while it is working. Requests that still wait are cancelled."""
    backend = Slow()

    async def main() -> None:
        batches = Batches(backend)
        asked = asyncio.ensure_future(batches.answer(asking("a")))
        while not backend.batches:
            await asyncio.sleep(0.01)
        later = asyncio.ensure_future(batches.answer(asking("b")))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, backend.may.set)
        await batches.end()
        assert await asked == answer("a")
        with pytest.raises(asyncio.CancelledError):
            await later

    asyncio.run(main())
    assert backend.batches == [["a"]]


def test_a_real_model(tmp_path: Path) -> None:
    """Requests with different sampling are in different batches, and each gets its own answer."""
    tiny_policy(tmp_path)
    greedy, short = Sampling(temperature=0, max_tokens=6), Sampling(temperature=0, max_tokens=2)

    async def main() -> list[Reply | Refusal]:
        async with open_answers(TransformersBackend(), str(tmp_path)) as answers:
            asked = [asking("ab", 1, greedy), asking("ab", 1, short), asking("ab", 2, greedy)]
            return list(await asyncio.gather(*map(answers.answer, asked)))

    one, two, three = asyncio.run(main())
    assert isinstance(one, Reply) and isinstance(two, Reply) and one == three
    assert two.tokens <= 2 and one.tokens <= 6 and one.text.startswith(two.text) and one.prompt_tokens > 0
