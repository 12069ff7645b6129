"""The interface of models that run in this process.

A model's output is text from outside. It is stored and compared, and it is only ever run in a sandbox.
"""

from collections.abc import Sequence
from typing import Protocol

from megatron_post.inference.request import Refusal, Reply, Request
from megatron_post.inference.settings import TransformersBackend, VllmBackend


class Backend(Protocol):
    """Answers requests in their order until it is closed. Raises `ValueError` for a user's errors."""

    def respond(self, requests: Sequence[Request]) -> list[Reply | Refusal]: ...

    def close(self) -> None:
        """Free the GPUs for another model."""


def open_backend(
    settings: TransformersBackend | VllmBackend, model: str, content_tokens: Sequence[str] = ()
) -> Backend:
    """Load a model. model: a Hugging Face directory. content_tokens: as in `load_tokenizer`.

    Raises `ValueError` if a package is missing.
    """
    if isinstance(settings, VllmBackend):
        from megatron_post.inference.vllm import Vllm

        return Vllm(settings, model, content_tokens)
    from megatron_post.inference.transformers import Transformers

    return Transformers(settings, model, content_tokens)
