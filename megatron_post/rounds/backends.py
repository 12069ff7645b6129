"""Who answers: plain `transformers`, vLLM's offline engine, or a server that speaks OpenAI's chat protocol.

What a model says is text from outside: it is stored and compared, and never run.
"""

import gc
import os
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol
from urllib.parse import urlsplit

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from megatron_post.config.consistency import Needs, without_effect
from megatron_post.config.section import Count, Name, NonNegative, Positive, Section, Whole
from megatron_post.convert.configs import dtype_name
from megatron_post.convert.hf_config import to_hf_config
from megatron_post.convert.hf_directory import HuggingFaceDirectory
from megatron_post.convert.source import read_rows
from megatron_post.data.dialog import Message
from megatron_post.data.template import render_prompt
from megatron_post.data.tokenizer import END_OF_MESSAGE, END_OF_TEXT, END_OF_TURN, Tokenizer, load_tokenizer
from megatron_post.installation import install_command
from megatron_post.parallel.environment import rank_from_environment

_SECONDS_TO_END = 120.0  # of a vLLM engine's processes


class Sampling(Section):
    """How responses are drawn."""

    samples: Count = Field(10, description="K, responses a prompt; the report drew 10 to 30")
    temperature: NonNegative = Field(1.0, description="0: the most probable, always")
    top_p: float = Field(
        1.0, gt=0, le=1, description="draw from the most probable tokens that have this probability together"
    )
    max_tokens: Count = Field(512, description="tokens of a response, at most")
    stop: tuple[str, ...] = Field(
        (END_OF_TURN, END_OF_MESSAGE, END_OF_TEXT), min_length=1, description="tokens that end a response"
    )
    seed: Whole = Field(0, description="each response draws with a seed of its own, which follows from this")

    @model_validator(mode="after")
    def _has_effect(self) -> "Sampling":
        if errors := without_effect(self, (Needs("top_p", "temperature", above=0),)):
            raise ValueError("\n".join(errors))
        return self


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


@dataclass(frozen=True)
class Request:
    """One response that is wanted. seed: of this response alone."""

    messages: tuple[dict[str, str], ...]
    seed: int


@dataclass(frozen=True)
class Response:
    """tokens: its length, the stop token included.

    finish: "stop", or why it ended otherwise, in the words of OpenAI's protocol: "length", "tool_calls".
    """

    text: str
    tokens: int
    finish: str


@dataclass(frozen=True)
class Failure:
    """A request that will not be answered, and why: it is refused, or too long. Others may be answered."""

    reason: str


class Backend(Protocol):
    """Answers requests, in their order, until it is closed. Raises `ValueError` for what a user can mend."""

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> list[Response | Failure]: ...

    def close(self) -> None:
        """Free the GPUs, for another model."""


def gpus_of(settings: BackendSettings) -> int:
    """GPUs of a node that a backend draws on, where there are any."""
    match settings:
        case TransformersBackend():
            return 1
        case VllmBackend():
            return settings.tensor_parallel
        case ServerBackend():
            return 0


def open_backend(settings: BackendSettings, model: str, content_tokens: Sequence[str] = ()) -> Backend:
    """model: Hugging Face directory. content_tokens: as `load_tokenizer` takes them, and none for a server.
    Raises `ValueError` where a package is missing."""
    match settings:
        case TransformersBackend():
            return _Transformers(settings, model, content_tokens)
        case VllmBackend():
            return _Vllm(settings, model, content_tokens)
        case ServerBackend():
            from megatron_post.rounds.server import Server  # no torch-heavy import depends on it

            return Server(settings)


class _Transformers:
    """A response depends on its own request alone, but for float rounding in batches of other widths."""

    def __init__(self, settings: TransformersBackend, model: str, content_tokens: Sequence[str]) -> None:
        from transformers import GenerationConfig
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._batch = settings.batch
        self._tokenizer = load_tokenizer(model, content_tokens=content_tokens)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._model = _llama(model, dtype).eval().to(device)
        # what a model's own file says (beams, penalties, least lengths) would join in silently
        self._model.generation_config = GenerationConfig()

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> list[Response | Failure]:
        prompts = [prompt_ids(request, self._tokenizer) for request in requests]
        found: dict[int, Response | Failure] = {}
        found |= _overlong(prompts, sampling, self._model.config.max_position_embeddings)
        # batches of prompts of like length waste the least on padding
        order = sorted((i for i in range(len(requests)) if i not in found), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), self._batch):
            members = order[start : start + self._batch]
            rows = self._generate(
                [prompts[i] for i in members], [requests[i].seed for i in members], sampling
            )
            found |= zip(members, rows, strict=True)
        return [found[i] for i in range(len(requests))]

    def close(self) -> None:
        del self._model
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Response]:
        """Rows leave the batch as they end: its longest response takes several times the mean's steps."""
        from transformers import DynamicCache

        width, pad = max(map(len, prompts)), self._tokenizer.pad_id
        device = self._model.device
        tokens = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        stops, cache = _stop_ids(self._tokenizer, sampling), DynamicCache()
        draws = _Draws(seeds, sampling) if sampling.temperature else None
        generated: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))
        for _ in range(sampling.max_tokens):
            output = self._model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            )
            scores = output.logits[:, -1]
            chosen = (scores if draws is None else draws(rows, scores)).argmax(-1)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                generated[row].append(token)
            going = [i for i, row in enumerate(rows) if generated[row][-1] not in stops]
            if not going:
                break
            if len(going) < len(rows):
                kept = torch.tensor(going, device=device)
                cache.batch_select_indices(kept)
                chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
                rows = [rows[i] for i in going]
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        return [_response(ids, stops, self._tokenizer) for ids in generated]


def _llama(directory: str, dtype: torch.dtype) -> Any:
    """A Llama of plain `transformers` with the config and weights of a directory, which our own readers read.

    Through other keys of its config, such as `auto_map`, and other files, such as adapters, a directory could
    have `transformers` load code or pickles.

    Raises `ValueError` where the directory holds no language model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    source = HuggingFaceDirectory(directory)
    if source.scalar_head:
        raise ValueError(f"{directory} is a reward model, which cannot generate")
    values = to_hf_config(source.model, dtype=dtype_name(dtype), bos_id=None, eos_ids=[], pad_id=None)
    weights = {
        name: read_rows(source, name, 0, kind.shape[0]).to(dtype) for name, kind in source.tensors.items()
    }
    return LlamaForCausalLM.from_pretrained(
        None,
        config=LlamaConfig.from_dict(values),
        state_dict=weights,
        dtype=dtype,
        attn_implementation="sdpa",
    )


class _Draws:
    """Samples by an exponential race: the token of the largest log p - log E, with E exponential, is one
    drawn from p. Each row has a generator of its own."""

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._sampling = sampling

    def __call__(self, rows: Sequence[int], scores: Tensor) -> Tensor:
        """scores: [b, v] logits; rows: which seed each of them has."""
        logps = torch.log_softmax(scores.float() / self._sampling.temperature, dim=-1)
        if self._sampling.top_p < 1:
            logps = nucleus(logps, self._sampling.top_p)
        noise = torch.empty(logps.shape)
        for i, row in enumerate(rows):
            noise[i].exponential_(generator=self._generators[row])
        return logps - noise.log().to(logps.device)


def nucleus(logps: Tensor, top_p: float) -> Tensor:
    """[b, v] log-probabilities, -inf but for the fewest most probable tokens that have `top_p` together."""
    ordered, index = logps.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    return torch.full_like(logps, -torch.inf).scatter(
        -1, index, ordered.masked_fill(before >= top_p, -torch.inf)
    )


class _Vllm:
    """vLLM's offline engine; prompts are shared by their samples through its prefix cache.

    Written by the sources of vLLM 0.32, and never run here.
    """

    def __init__(self, settings: VllmBackend, model: str, content_tokens: Sequence[str]) -> None:
        _, _, local_rank = rank_from_environment()
        os.environ |= {
            # the engine in a process of its own, which frees its GPUs; forked, it would fail where this one
            # has begun CUDA, if only to ask for it
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_NO_USAGE_STATS": "1",
        }
        # engines that start together would write one cache, in a home that nodes share
        cache = Path(tempfile.gettempdir(), f"vllm-{os.getuid()}-{local_rank}")
        os.environ.setdefault("VLLM_CACHE_ROOT", str(cache))
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ValueError(
                f"backend vllm: {error}; on a machine with a GPU, {install_command('generate')}, or choose "
                "the backend transformers or server"
            ) from None
        self._parameters: Any = SamplingParams
        self._tokenizer = load_tokenizer(model, content_tokens=content_tokens)
        # it would not notice that this process is gone, and would keep the GPUs
        self._terminated = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            self._engine = LLM(
                model=model,
                tensor_parallel_size=settings.tensor_parallel,
                quantization=settings.quantization,
                gpu_memory_utilization=settings.memory_share,
                enable_prefix_caching=True,
                trust_remote_code=False,
                load_format="safetensors",  # and no pickled .bin
                max_model_len=-1,  # what memory holds: of the model's own length one request must fit
            )
        except RuntimeError as error:
            signal.signal(signal.SIGTERM, self._terminated)
            raise ValueError(f"vLLM did not start on {model}: {error}; its lines above say why") from error

    def close(self) -> None:
        self._engine.llm_engine.engine_core.shutdown(timeout=_SECONDS_TO_END)
        del self._engine
        gc.collect()
        signal.signal(signal.SIGTERM, self._terminated)

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> list[Response | Failure]:
        stops = _stop_ids(self._tokenizer, sampling)
        prompts = [prompt_ids(request, self._tokenizer) for request in requests]
        found: dict[int, Response | Failure] = {}
        found |= _overlong(prompts, sampling, self._engine.model_config.max_model_len)
        asked = [i for i in range(len(requests)) if i not in found]
        outputs = self._engine.generate(
            [{"prompt_token_ids": prompts[i]} for i in asked],
            [
                self._parameters(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_tokens,
                    seed=requests[i].seed,
                    stop_token_ids=stops,
                    ignore_eos=True,  # the stop tokens are those of `stop`, and not the model's besides
                    detokenize=False,
                )
                for i in asked
            ],
            use_tqdm=False,
        )
        for i, output in zip(asked, outputs, strict=True):
            found[i] = _response(list(output.outputs[0].token_ids), stops, self._tokenizer)
        return [found[i] for i in range(len(requests))]


def _overlong(prompts: Sequence[Sequence[int]], sampling: Sampling, limit: int) -> dict[int, Failure]:
    """By index: prompts which, with their responses, are longer than the model can see."""
    lengths = [len(prompt) + sampling.max_tokens for prompt in prompts]
    return {
        i: Failure(
            f"the prompt and max_tokens={sampling.max_tokens} take {length} positions, of the {limit} that "
            "the model has"
        )
        for i, length in enumerate(lengths)
        if length > limit
    }


def prompt_ids(request: Request, tokenizer: Tokenizer) -> list[int]:
    """The conversation and the header of the answer."""
    messages = [Message(m["role"], m["content"]) for m in request.messages]  # type: ignore[arg-type]
    return render_prompt(messages, tokenizer).tolist()


def _stop_ids(tokenizer: Tokenizer, sampling: Sampling) -> list[int]:
    """Of the stop tokens that the tokenizer has. Raises `ValueError` where it has none of them."""
    found = [i for i in tokenizer.stop_ids if tokenizer.decode([i]) in sampling.stop]
    if not found:
        raise ValueError(f"sampling.stop={list(sampling.stop)}: the tokenizer has none of these")
    return found


def _response(generated: list[int], stops: Sequence[int], tokenizer: Tokenizer) -> Response:
    """What was generated, up to and with its stop token; padding follows it.

    A message that ends with <|eom_id|> calls a tool and waits for its output: it is no whole answer.
    """
    end = next((i for i, token in enumerate(generated) if token in stops), None)
    text = tokenizer.decode(generated[:end], skip_special=True)
    if end is None:
        return Response(text, len(generated), "length")
    calls = tokenizer.decode([generated[end]]) == END_OF_MESSAGE
    return Response(text, end + 1, "tool_calls" if calls else "stop")
