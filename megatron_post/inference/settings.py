"""Who answers: plain `transformers`, vLLM's offline engine, or a server with OpenAI's chat interface."""

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from megatron_post.config.section import Count, Name, Positive, Section, Whole
from megatron_post.inference.request import Sampling


class SamplesPerPrompt(Sampling):
    """How the responses to a prompt are drawn."""

    samples: Count = Field(10, description="K, responses a prompt; the report drew 10 to 30")
    seed: Whole = Field(0, description="each response draws with a seed of its own, which follows from this")

    @property
    def of_each(self) -> Sampling:
        """How one of them is drawn."""
        return Sampling.model_validate(self.model_dump(exclude={"samples", "seed"}))


class TransformersBackend(Section):
    """Hugging Face's `generate` in this process. It needs nothing else, and is slow."""

    kind: Literal["transformers"] = Field("transformers", description="selects this backend")
    batch: Count = Field(64, description="responses drawn at a time")


class VllmBackend(Section):
    """A vLLM engine in this process."""

    kind: Literal["vllm"] = Field(description="selects this backend")
    tensor_parallel: Count = Field(1, description="GPUs that hold one copy of the model")
    quantization: Name | None = Field(
        None,
        description="vLLM's name, such as fp8_per_tensor, of how it holds weights; null: as they are",
    )
    memory_share: float = Field(0.9, gt=0, le=1, description="of the GPU's memory")


class ServerBackend(Section):
    """A server with OpenAI's interface, which runs already."""

    kind: Literal["server"] = Field(description="selects this backend")
    url: str = Field(description="up to and with /v1")
    served_model: Name = Field(description="the model's name there")
    timeout: Positive = Field(120.0, description="seconds for one response")
    retries: Whole = Field(7, description="after 0.5, 1, 2, ... s; by default within a minute")
    parallel_requests: Count = Field(16, description="requests that the server is sent at a time")
    api_key_variable: str | None = Field(None, description="environment variable with the key")

    @field_validator("url")
    @classmethod
    def _holds_no_secret(cls, url: str) -> str:
        """Values are printed in messages and kept beside outputs. These errors do not say them."""
        try:
            parts = urlsplit(url)
            is_plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # of its port or its brackets
            is_plain = False
        if "@" in url or "?" in url or "#" in url:
            raise ValueError(
                "a URL with a user, a password or parameters is refused, since it would be printed and kept "
                "beside outputs: put the key into an environment variable, and name that in api_key_variable"
            )
        if not is_plain or not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError("it must read http://HOST[:PORT]/v1 or https://HOST[:PORT]/v1")
        return url

    @field_validator("api_key_variable")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError(
                "it must be the name of an environment variable, in capitals, and not the key itself "
                "(which is why the value is not shown)"
            )
        return name


BackendSettings = Annotated[TransformersBackend | VllmBackend | ServerBackend, Field(discriminator="kind")]


def gpus_of(settings: BackendSettings) -> int:
    """GPUs of a node that a backend draws on, where there are any."""
    match settings:
        case TransformersBackend():
            return 1
        case VllmBackend():
            return settings.tensor_parallel
        case ServerBackend():
            return 0
