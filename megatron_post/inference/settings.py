"""The settings of backends, which are `transformers`, vLLM's offline engine, and servers."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megatron_post.config.section import Count, Line, Name, NonNegative, Positive, Section, Whole
from megatron_post.inference.request import Sampling
from megatron_post.storage.reading import did_you_mean

PART = "prompts that a model in this process answers together. A crash loses those in progress"
_MOST_SERVERS = 64


class SamplesPerPrompt(Sampling):
    """How the responses to a prompt are sampled."""

    samples: Count = Field(10, description="responses per prompt. The report used 10 to 30")
    seed: Whole = Field(0, description="the seed of each response follows from it")

    @property
    def of_each(self) -> Sampling:
        """How a single response is sampled."""
        return Sampling.model_validate(self.model_dump(exclude={"samples", "seed"}))


class TransformersBackend(Section):
    """Hugging Face's `transformers` in this process. It needs no other package, and is slow."""

    kind: Literal["transformers"] = Field("transformers", description="selects this backend")
    batch: Count = Field(64, description="responses that are generated at once")


class VllmBackend(Section):
    """A vLLM engine in this process."""

    kind: Literal["vllm"] = Field(description="selects this backend")
    tensor_parallel: Count = Field(1, description="GPUs that hold one copy of the model")
    quantization: Name | None = Field(
        None,
        description="vLLM's name of a weight format, such as fp8_per_tensor. null: as stored",
    )
    memory_share: float = Field(0.9, gt=0, le=1, description="share of the GPU's memory")


class ServerBackend(Section):
    """Running servers of one model with OpenAI's interface."""

    kind: Literal["server"] = Field(description="selects this backend")
    url: str | tuple[str, ...] | None = Field(
        None, description="url up to and including /v1. Several servers of the model share the requests"
    )
    urls_from: Name | None = Field(
        None,
        description="directory of *.url files with one url each, which are read again during the run, and of "
        "`key`, if the servers want one",
    )
    served_model: Name = Field(description="name of the model on the server")
    timeout: Positive = Field(120.0, description="seconds for one response")
    retries: Whole = Field(
        7, description="tries after waits of about 0.5, 1, 2, ... s, by default within a minute"
    )
    patience: NonNegative | None = Field(
        None,
        description="seconds without any answer that a run tolerates after its retries. null: half an "
        "hour with urls_from, and otherwise 0",
    )
    parallel_requests: Count = Field(16, description="requests that are sent to a server at once")
    api_key_variable: str | None = Field(None, description="environment variable with the key")

    @property
    def most_in_flight(self) -> int:
        """The largest number of open requests. With urls_from there may be many servers."""
        return self.parallel_requests * (len(self.urls) or _MOST_SERVERS)

    @property
    def urls(self) -> tuple[str, ...]:
        """The urls of the settings, without those of urls_from."""
        return () if self.url is None else (self.url,) if isinstance(self.url, str) else self.url

    @field_validator("url")
    @classmethod
    def _are_urls(cls, url: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        urls = () if url is None else (url,) if isinstance(url, str) else url
        if len({*map(check_url, urls)}) < len(urls):
            raise ValueError("one of the servers is named twice; leave one out")
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

    @model_validator(mode="after")
    def _says_where(self) -> "ServerBackend":
        if bool(self.urls) == (self.urls_from is not None):
            raise ValueError("give either the url of a server, or several, or urls_from")
        return self


def check_url(url: str) -> str:
    """The url itself. Raises `ValueError` if it contains a secret or is not a url.

    The message does not repeat the url, because messages are printed and saved next to outputs.
    """
    try:
        parts = urlsplit(url)
        is_plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a wrong port or bracket
        is_plain = False
    if "@" in url or "?" in url or "#" in url:
        raise ValueError(
            "a URL with a user, a password or parameters is refused, since it would be printed and kept "
            "beside outputs: put the key into an environment variable, and name that in api_key_variable"
        )
    if not is_plain or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("it must read http://HOST[:PORT]/v1 or https://HOST[:PORT]/v1")
    return url


BackendSettings = Annotated[TransformersBackend | VllmBackend | ServerBackend, Field(discriminator="kind")]


class AskedModel(Section):
    """A model that a run asks by a name of its own, such as `author` or `judge`."""

    model: Name = Field(description="Hugging Face directory. With a server, only a name that rows record")
    backend: BackendSettings = Field(description="server or process that answers the requests")
    sampling: Sampling = Field(Sampling(), description="sampling where the caller sets no other values")


def _names_stand_for_models(models: Any) -> Any:
    """Resolve names, such as `judge: author`, which gives the judge the values of the author."""
    if not isinstance(models, dict):
        return models
    models = {name: models.get(value, value) if isinstance(value, str) else value
              for name, value in models.items()}  # fmt: skip
    for name, value in models.items():
        if isinstance(value, str):
            described = [other for other, found in models.items() if not isinstance(found, str)]
            raise ValueError(
                f"{name}: {value!r} is not the name of a model here{did_you_mean(value, described)}"
            )
    return models


AskedModels = Annotated[dict[Line, AskedModel], BeforeValidator(_names_stand_for_models)]


def gpus_of(settings: BackendSettings) -> int:
    """The number of GPUs of a node that a backend uses, if the node has GPUs."""
    match settings:
        case TransformersBackend():
            return 1
        case VllmBackend():
            return settings.tensor_parallel
        case ServerBackend():
            return 0
