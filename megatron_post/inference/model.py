"""Sends requests to a model and records answers in a journal, so that no request is sent twice."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_post.data.dialog import Message
from megatron_post.inference.answers import Answers
from megatron_post.inference.journal import Journal, key_of
from megatron_post.inference.request import Refusal, Reply, Request, Sampling, reply_from_json


class Refused(Exception):
    """A request is refused, or its answer cannot be used. After a restart it is refused again."""

    def __init__(self, reason: str, key: str) -> None:
        super().__init__(reason)
        self.reason, self.key = reason, key


@dataclass
class Usage:
    """Counts of a model's requests in this process. asked: those that were sent, and not replayed."""

    asked: int = 0
    replayed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    tokens: int = 0


class Model:
    """Sends each request once, and afterwards takes its answer from the journal."""

    def __init__(
        self,
        answers: Answers,
        journal: Journal,
        *,
        name: str,
        scope: Sequence[str | int],
        sampling: Sampling | None = None,
    ) -> None:
        """name: the model's name. scope: the name and version of the caller, such as a recipe.

        Requests of another name or scope have other keys, so they do not share answers.
        """
        self._answers, self._journal = answers, journal
        self._name, self._scope = name, list(scope)
        self._sampling = sampling or Sampling()
        self._asking: dict[str, asyncio.Event] = {}
        self.usage = Usage()

    async def ask(
        self,
        messages: str | Sequence[Message],
        *,
        seed: int = 0,
        tools: Sequence[dict[str, Any]] = (),
        **sampling: Any,
    ) -> Reply:
        """The reply to a request. Equal requests have the same reply. Use another seed for another reply.

        messages: a text is one user message. sampling: values of `Sampling` for this request only. Raises
        `Refused`, `ValueError` for wrong arguments, and the errors of the backend.
        """
        if isinstance(messages, str):
            messages = [Message("user", messages)]
        values = self._sampling
        if sampling:
            values = Sampling.model_validate(values.model_dump() | sampling)
        return await self.answer(Request(tuple(messages), values, seed, tuple(tools)))

    async def answer(self, request: Request) -> Reply:
        """The reply to a `Request`, as in `ask`."""
        key = self.key_of(request)
        # Another caller may have sent the same request. Wait for its answer instead of sending it twice.
        while (asking := self._asking.get(key)) is not None:
            await asking.wait()
        entry = self._journal.get(key)
        if entry is None:
            self._asking[key] = asyncio.Event()
            try:
                entry = self._keep(key, request, await self._answers.answer(request))
            finally:
                self._asking.pop(key).set()
        else:
            self.usage.replayed += 1
        answer = answer_in(entry, key)
        if isinstance(answer, Refusal):
            raise Refused(answer.reason, key)
        return answer

    def key_of(self, request: Request) -> str:
        """The journal's key of a request."""
        return key_of(model=self._name, scope=self._scope, **request.as_json())

    def _keep(self, key: str, request: Request, answer: Reply | Refusal) -> dict[str, Any]:
        self.usage.asked += 1
        if isinstance(answer, Refusal):
            self.usage.refused += 1
        else:
            self.usage.tokens += answer.tokens
            self.usage.prompt_tokens += answer.prompt_tokens
        return append_answer(self._journal, key, request, answer)


def append_answer(journal: Journal, key: str, request: Request, answer: Reply | Refusal) -> dict[str, Any]:
    """Append an answer and its request to the journal. The request is for people. Returns the entry."""
    kind, value = ("refusal", answer.reason) if isinstance(answer, Refusal) else ("reply", answer.as_json())
    entry = {"request": request.as_json(), kind: value}
    journal.append(key, kind, entry)
    return entry


def answer_in(entry: dict[str, Any], key: str) -> Reply | Refusal:
    """The answer in an entry that `append_answer` has written."""
    return Refusal(entry["refusal"]) if "refusal" in entry else reply_from_json(entry["reply"], key)
