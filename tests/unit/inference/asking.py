"""Requests and replies of the tests, in few words."""

from typing import Any

from megatron_post.data.dialog import Message
from megatron_post.inference.request import Reply, Request, Sampling, assistant_message


def asking(text: str, seed: int = 1, sampling: Sampling | None = None) -> Request:
    """One message of the user."""
    return Request((Message("user", text),), sampling or Sampling(), seed)


def answer(text: str, tokens: int = 5, finish: str = "stop", prompt_tokens: int = 0, **more: Any) -> Reply:
    """more: what `assistant_message` takes."""
    return Reply(assistant_message(text, finish=finish, **more), finish, tokens, prompt_tokens)
