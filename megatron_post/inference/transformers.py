"""Generates with Hugging Face's `transformers` in this process."""

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_post.convert.configs import dtype_name
from megatron_post.convert.hf_config import to_hf_config
from megatron_post.convert.hf_directory import HuggingFaceDirectory
from megatron_post.convert.source import read_rows
from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.inference.request import Refusal, Reply, Request, Sampling
from megatron_post.inference.settings import TransformersBackend
from megatron_post.inference.tokens import overlong, prompt_ids, reply_of, stop_ids


class Transformers:
    """A backend on plain `transformers`.

    A response depends only on its own request, except for float rounding in batches of other widths.
    """

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
        # The model's generation_config.json (beams, penalties, minimum lengths) would change results
        # silently.
        self._model.generation_config = GenerationConfig()

    def respond(self, requests: Sequence[Request]) -> list[Reply | Refusal]:
        prompts = [prompt_ids(request, self._tokenizer) for request in requests]
        found: dict[int, Reply | Refusal] = {}
        found |= overlong(requests, prompts, self._model.config.max_position_embeddings)
        # Batches of prompts of similar length have the least padding.
        order = sorted((i for i in range(len(requests)) if i not in found), key=lambda i: len(prompts[i]))
        drawn_alike: dict[Sampling, list[int]] = {}
        for i in order:
            drawn_alike.setdefault(requests[i].sampling, []).append(i)
        for sampling, members in drawn_alike.items():
            for batch in (members[i : i + self._batch] for i in range(0, len(members), self._batch)):
                seeds = [requests[i].seed for i in batch]
                replies = self._generate([prompts[i] for i in batch], seeds, sampling)
                found |= zip(batch, replies, strict=True)
        return [found[i] for i in range(len(requests))]

    def close(self) -> None:
        del self._model
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Reply]:
        """Generate a batch. Rows leave it when they end.

        This matters because the longest response of a batch needs several times as many steps as the mean.
        """
        from transformers import DynamicCache

        width, pad = max(map(len, prompts)), self._tokenizer.pad_id
        device = self._model.device
        tokens = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        stops, cache = stop_ids(self._tokenizer, sampling), DynamicCache()
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
        return [
            reply_of(ids, stops, self._tokenizer, prompt)
            for ids, prompt in zip(generated, prompts, strict=True)
        ]


def _llama(directory: str, dtype: torch.dtype) -> Any:
    """A Llama of plain `transformers` with a directory's config and weights, read by this package.

    `transformers` does not read the directory itself. Other keys of the config, such as `auto_map`, and other
    files, such as adapters, could make it load code or pickles. Raises `ValueError` if the directory has no
    language model.
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
    """Samples by an exponential race. Each row has its own random generator.

    With exponential random numbers E, the token of the largest log p - log E is distributed as p.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._sampling = sampling

    def __call__(self, rows: Sequence[int], scores: Tensor) -> Tensor:
        """log p - log E, [b, v]. scores: [b, v] logits. rows: the index of each row's seed."""
        logps = torch.log_softmax(scores.float() / self._sampling.temperature, dim=-1)
        if self._sampling.top_p < 1:
            logps = nucleus(logps, self._sampling.top_p)
        noise = torch.empty(logps.shape)
        for i, row in enumerate(rows):
            noise[i].exponential_(generator=self._generators[row])
        return logps - noise.log().to(logps.device)


def nucleus(logps: Tensor, top_p: float) -> Tensor:
    """Log-probabilities, [b, v], with -inf for all but the most probable tokens that reach `top_p`."""
    ordered, index = logps.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    return torch.full_like(logps, -torch.inf).scatter(
        -1, index, ordered.masked_fill(before >= top_p, -torch.inf)
    )
