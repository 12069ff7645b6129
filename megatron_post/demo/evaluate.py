"""Generates a Hugging Face model's answers with plain `transformers`, and measures their accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_post.demo.task import Problem, check_answer, shows_working
from megatron_post.rounds.accuracy import Accuracy

_BATCH = 128


@dataclass(frozen=True)
class Response:
    """A response of the model. Token ids are without padding. The response includes its stop token."""

    prompt_ids: list[int]
    response_ids: list[int]
    text: str


def answer_with_transformers(
    directory: Path, problems: Sequence[Problem], *, seed: int | None = None
) -> list[Response]:
    """Responses of the exported model, in batches padded on the left, through its own chat template.

    seed: of samples at temperature 1. None: greedy responses. Generation ends at a stop token, or when the
    response is longer than every correct response.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    plain: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    # Generation continues at the right end of a row, so padding must be on the left.
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left", **plain)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, use_safetensors=True, **plain
    ).eval()
    longest = max(len(tokenizer.encode(problem.solution, add_special_tokens=False)) for problem in problems)
    stops = set(model.generation_config.eos_token_id)
    responses: list[Response] = []
    for start in range(0, len(problems), _BATCH):
        chats = [list(problem.messages) for problem in problems[start : start + _BATCH]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        if seed is not None:
            torch.manual_seed(seed + start)
        options = (
            {"do_sample": False}
            if seed is None
            else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        )
        output = model.generate(**inputs, **options, max_new_tokens=longest + 8)
        width = inputs["input_ids"].shape[1]
        for ids, mask, generated in zip(
            inputs["input_ids"], inputs["attention_mask"], output[:, width:].tolist(), strict=True
        ):
            end = next((i + 1 for i, token in enumerate(generated) if token in stops), len(generated))
            text = tokenizer.decode(generated[:end], skip_special_tokens=True)
            responses.append(Response(ids[mask.bool()].tolist(), generated[:end], text))
    return responses


def accuracy(problems: Sequence[Problem], responses: Sequence[Response]) -> Accuracy:
    """Exact match of responses to their problems."""
    right = [check_answer(p, r.text) for p, r in zip(problems, responses, strict=True)]
    return Accuracy(sum(right), len(right))


def working_share(responses: Sequence[Response]) -> float:
    """Share of the responses that show their working."""
    return sum(shows_working(response.text) for response in responses) / len(responses)
