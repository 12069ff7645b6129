"""Preference examples of random tokens, their packs in every layout, and the losses as loops."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_post.config.losses import DPO
from megatron_post.data.pack import Pack, pack_of_segments
from megatron_post.data.template import Rendered, TokenRole

PACK_LENGTH = 640


@dataclass(frozen=True)
class Example:
    """A prompt and its responses, best first. Each response ends with a terminator."""

    prompt: Rendered
    responses: tuple[Rendered, ...]


def examples(count: int, *, sizes: Sequence[int] = (2,), seed: int = 0) -> list[Example]:
    """`count` examples of random tokens, with prompts of 3 to 9 tokens and responses of 2 to 12 tokens.

    sizes: the numbers of responses of an example, which are used in turn.
    """
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        prompt = _rendered(rng, int(rng.integers(3, 10)), TokenRole.PROMPT, TokenRole.HEADER)
        responses = tuple(
            _rendered(rng, int(rng.integers(2, 13)), TokenRole.BODY, TokenRole.TERMINATOR)
            for _ in range(sizes[i % len(sizes)])
        )
        made.append(Example(prompt, responses))
    return made


def packs(made: Sequence[Example], *, counts: Sequence[int], layout: str) -> list[Pack]:
    """Packs with `counts` examples each.

    Segments are padded to multiples of 4, as CP 2 needs. Responses are not in the order of their ranks.
    """
    result, start = [], 0
    for count in counts:
        segments: list[Rendered] = []
        units, ranks = [], []
        for number, example in enumerate(made[start : start + count]):
            order = list(range(len(example.responses)))
            order = order[1:] + order[:1] if number % 2 else order
            if layout == "separate":
                segments += [joined(example.prompt, example.responses[rank]) for rank in order]
            elif layout == "isolated_pairs":
                shared, last = example.prompt[:-1], example.prompt[-1:]
                segments += [shared, *(joined(last, example.responses[rank]) for rank in order)]
                order = [-1, *order]
            else:
                segments += [example.prompt, *(example.responses[rank] for rank in order)]
                order = [-1, *order]
            units += [number] * len(order)
            ranks += order
        pack = pack_of_segments(segments, pack_length=PACK_LENGTH, segment_multiple=4)
        tail = [-1] * (len(pack.ranks) - len(ranks))
        result.append(
            replace(pack, unit_ids=np.array(units + tail), ranks=np.array(ranks + tail, dtype=np.int32))
        )
        start += count
    return result


def joined(prompt: Rendered, response: Rendered) -> Rendered:
    return Rendered(
        np.concatenate((prompt.tokens, response.tokens)), np.concatenate((prompt.roles, response.roles))
    )


def dpo_by_hand(policy: Any, reference: Any, made: Sequence[Example], settings: DPO) -> dict[str, Tensor]:
    """Sums of the sigmoid loss and its metrics over pairs, by loops over rows and tokens without masks."""
    sums: dict[str, Any] = {name: 0.0 for name in ("loss", "nll", "margin", "accuracy", "logps_chosen", "kl")}
    for example in made:
        pi = [_token_logps(policy, example.prompt, response) for response in example.responses]
        with torch.no_grad():
            ref = [_token_logps(reference, example.prompt, response) for response in example.responses]
        ratios = [sum(p - r for p, r in zip(a, b, strict=True)) for a, b in zip(pi, ref, strict=True)]
        nll = -sum(pi[0]) / max(len(pi[0]), 1)
        delta = settings.beta * (ratios[0] - ratios[1])
        sums["loss"] += torch.log1p(torch.exp(-delta)) + settings.nll_weight * nll
        sums["nll"] += nll
        sums["margin"] += delta
        sums["accuracy"] += float(delta > 0)
        sums["logps_chosen"] += sum(pi[0])
        tokens = [(r - p) for a, b in zip(pi, ref, strict=True) for p, r in zip(a, b, strict=True)]
        sums["kl"] += sum(torch.exp(x) - 1 - x for x in tokens) / len(tokens)
    return sums


def ranking_by_hand(model: Any, made: Sequence[Example]) -> dict[str, Tensor]:
    """Sums over examples. Each response is in its own row and is scored at its last token."""
    sums: dict[str, Any] = {"loss": 0.0, "margin": 0.0, "accuracy": 0.0}
    for example in made:
        scores = [_score(model, joined(example.prompt, response)) for response in example.responses]
        pairs = [(a, b) for i, a in enumerate(scores) for b in scores[i + 1 :]]
        for a, b in pairs:
            sums["loss"] += torch.log1p(torch.exp(b - a)) / len(pairs)
            sums["margin"] += (a - b) / len(pairs)
            sums["accuracy"] += float(a > b) / len(pairs)
    return sums


def _token_logps(model: Any, prompt: Rendered, response: Rendered) -> list[Tensor]:
    """log p of each body token of a response, given all tokens before it. The terminator is left out."""
    tokens = np.concatenate((prompt.tokens, response.tokens))
    logits = model(torch.from_numpy(tokens).long()[None]).logits[0].log_softmax(-1)
    start = len(prompt)
    return [logits[start + i - 1, int(tokens[start + i])] for i in range(len(response) - 1)]


def _score(model: Any, row: Rendered) -> Tensor:
    hidden = model.model(torch.from_numpy(row.tokens).long()[None]).last_hidden_state[0, -1]
    return (model.score.weight @ hidden)[0]


def _rendered(rng: np.random.Generator, length: int, role: TokenRole, last: TokenRole) -> Rendered:
    roles = np.full(length, role, dtype=np.uint8)
    roles[-1] = last
    return Rendered(rng.integers(0, 250, length).astype(np.int32), roles)
