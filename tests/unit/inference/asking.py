"""Short helpers that make requests and replies for tests."""

import asyncio
from collections.abc import Sequence
from typing import Any

from megatron_post.data.dialog import Message
from megatron_post.inference.request import Refusal, Reply, Request, Sampling, assistant_message
from megatron_post.inference.server import Server
from megatron_post.inference.settings import ServerBackend


def asking(text: str, seed: int = 1, sampling: Sampling | None = None) -> Request:
    """A request with one user message."""
    return Request((Message("user", text),), sampling or Sampling(), seed)


def answer(text: str, tokens: int = 5, finish: str = "stop", prompt_tokens: int = 0, **more: Any) -> Reply:
    """A reply. more: arguments of `assistant_message`."""
    return Reply(assistant_message(text, finish=finish, **more), finish, tokens, prompt_tokens)


def ask_server(settings: ServerBackend, requests: Sequence[Request]) -> list[Reply | Refusal]:
    """The answers to all requests, which are sent at once."""

    async def main() -> list[Reply | Refusal]:
        async with Server(settings) as server:
            return list(await asyncio.gather(*map(server.answer, requests)))

    return asyncio.run(main())
