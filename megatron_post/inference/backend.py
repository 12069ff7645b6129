"""What answers many requests at a time.

What a model says is text from outside. It is stored and compared, and it is run in a sandbox or not at all.
"""

from collections.abc import Sequence
from typing import Protocol

from megatron_post.inference.request import Refusal, Reply, Request
from megatron_post.inference.settings import (
    BackendSettings,
    ServerBackend,
    TransformersBackend,
    VllmBackend,
)


class Backend(Protocol):
    """Answers requests, in their order, until it is closed. Raises `ValueError` for what a user can mend."""

    def respond(self, requests: Sequence[Request]) -> list[Reply | Refusal]: ...

    def close(self) -> None:
        """Free the GPUs, for another model."""


def open_backend(settings: BackendSettings, model: str, content_tokens: Sequence[str] = ()) -> Backend:
    """model: Hugging Face directory. content_tokens: as `load_tokenizer` takes them, and none for a server.
    Raises `ValueError` where a package is missing."""
    match settings:
        case TransformersBackend():
            from megatron_post.inference.transformers import Transformers

            return Transformers(settings, model, content_tokens)
        case VllmBackend():
            from megatron_post.inference.vllm import Vllm

            return Vllm(settings, model, content_tokens)
        case ServerBackend():
            from megatron_post.inference.server import Server

            return Server(settings)
