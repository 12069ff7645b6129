"""Sends requests to a model and records answers in a journal, so that no request is sent twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_post.data.dialog import Message
from megatron_post.inference.answers import Answers
from megatron_post.inference.journal import Journal, key_of
from megatron_post.inference.request import Refusal, Reply, Request, Sampling, reply_from_json


class Refused(Exception):
    """A request is refused, or its answer cannot be used. After a restart it is refused again.

    unusable: as in `Refusal`.
    """

    def __init__(self, reason: str, key: str, *, unusable: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.key, self.unusable = reason, key, unusable


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
        key, asked = self.key_of(request), False

        async def ask() -> tuple[str, dict[str, Any]]:
            nonlocal asked
            asked = True
            answer = await self._answers.answer(request)
            self._count(answer)
            return entry_of(request, answer)

        entry = await self._journal.once(key, ask)
        self.usage.replayed += not asked
        answer = answer_in(entry, key)
        if isinstance(answer, Refusal):
            raise Refused(answer.reason, key, unusable=answer.unusable)
        return answer

    def key_of(self, request: Request) -> str:
        """The journal's key of a request."""
        return key_of(model=self._name, scope=self._scope, **request.as_json())

    def _count(self, answer: Reply | Refusal) -> None:
        self.usage.asked += 1
        if isinstance(answer, Refusal):
            self.usage.refused += 1
        else:
            self.usage.tokens += answer.tokens
            self.usage.prompt_tokens += answer.prompt_tokens


def entry_of(request: Request, answer: Reply | Refusal) -> tuple[str, dict[str, Any]]:
    """The kind and the entry of an answer in the journal. The request in it is for people."""
    if isinstance(answer, Refusal):
        unusable = {"unusable": True} if answer.unusable else {}
        return "refusal", {"request": request.as_json(), "refusal": answer.reason, **unusable}
    return "reply", {"request": request.as_json(), "reply": answer.as_json()}


def answer_in(entry: dict[str, Any], key: str) -> Reply | Refusal:
    """The answer in an entry that `entry_of` has made."""
    if "refusal" in entry:
        return Refusal(entry["refusal"], entry.get("unusable", False))
    return reply_from_json(entry["reply"], key)
