"""Runs the trainer's own model in this process: its initial weights, and a comparison with `transformers`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_post.config.schema import Config
from megatron_post.config.sections import Parallel
from megatron_post.convert.hf_reader import load_weights, open_weights
from megatron_post.convert.hf_writer import export_hf
from megatron_post.data.batch import batch_of_pack, role_numbers
from megatron_post.data.pack import pack_of_segments
from megatron_post.data.template import Rendered
from megatron_post.data.tokenizer import tokenizer_of
from megatron_post.demo.evaluate import Response
from megatron_post.models.build import build_model
from megatron_post.models.llama import Llama
from megatron_post.models.packing import portable_segments
from megatron_post.parallel.context import ContextSplit
from megatron_post.parallel.topology import parallel_run

_TOKENS_AT_ONCE = 8192


def export_initial_weights(config: Config, directory: Path) -> None:
    """Write the weights that training starts from. They depend on the seed and not on the layout."""
    alone = config.model_copy(update={"parallel": Parallel()})
    tokenizer = tokenizer_of(config)
    with parallel_run(alone.parallel, seed=config.seed) as topology:
        models = build_model(alone, topology, portable=True)
        load_weights(models, open_weights(config.model, seed=config.seed), config.model)
        export_hf(models, config.model, tokenizer, topology, directory)


def responses_match(config: Config, directory: Path, responses: Sequence[Response]) -> list[bool]:
    """For each response of `transformers` with the model in `directory`, whether our model gives the same.

    Our model reads prompt and response at once, packed. Suppose its most probable next token is the
    response's at every position. Then, by induction over the positions, its own greedy decoding gives exactly
    that response.
    """
    model = config.model.model_copy(update={"init_from": str(directory)})
    alone = config.model_copy(update={"parallel": Parallel(), "model": model})
    with parallel_run(alone.parallel, seed=config.seed) as topology, torch.no_grad():
        (llama,) = build_model(alone, topology, portable=True)
        load_weights([llama], open_weights(model, seed=config.seed), model)
        return [same for pack in _packs(responses) for same in _compare(llama.eval(), pack)]


def _compare(llama: Llama, pack: Sequence[Response]) -> Iterator[bool]:
    rows = [np.array(response.prompt_ids + response.response_ids, dtype=np.int32) for response in pack]
    segments = [Rendered(row, np.ones(len(row), dtype=np.uint8)) for row in rows]
    batch = batch_of_pack(pack_of_segments(segments, pack_length=sum(map(len, rows))), role_numbers(()))
    packed = portable_segments(batch, ContextSplit(batch.cu_seqlens, 1), rank=0, device=batch.tokens.device)
    logits: Tensor = llama(
        batch.tokens[None], batch.positions[None], None, packed_seq_params=packed
    )  # [t, 1, v]
    choices = logits[:, 0].argmax(-1).tolist()
    for response, end in zip(pack, batch.cu_seqlens[1:].tolist(), strict=True):
        # the logits of the prompt's last token choose the response's first token
        start = end - len(response.response_ids) - 1
        yield choices[start : end - 1] == response.response_ids


def _packs(responses: Sequence[Response]) -> Iterator[list[Response]]:
    """Consecutive responses that fit together in `_TOKENS_AT_ONCE`."""
    pack: list[Response] = []
    held = 0
    for response in responses:
        length = len(response.prompt_ids) + len(response.response_ids)
        if pack and held + length > _TOKENS_AT_ONCE:
            yield pack
            pack, held = [], 0
        pack.append(response)
        held += length
    if pack:
        yield pack
