"""Tests of the backend on plain `transformers`, of its random draws, and of the end of a reply."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_post.data.special_tokens import END_OF_MESSAGE, END_OF_TEXT, END_OF_TURN
from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.inference.backend import open_backend
from megatron_post.inference.request import Refusal, Reply, Sampling
from megatron_post.inference.settings import TransformersBackend
from megatron_post.inference.tokens import prompt_ids, reply_of
from megatron_post.inference.transformers import Transformers, nucleus
from megatron_post.inference.transformers import _Draws as Draws
from tests.unit.data.thinking import THINK, add_think
from tests.unit.inference.asking import answer, asking
from tests.unit.rounds.models import tiny_policy


def test_transformers_draws_by_seed_alone(tmp_path: Path) -> None:
    """Other batches and another order give the same responses. Greedy responses are equal for all samples."""
    tiny_policy(tmp_path)
    sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=8)
    # one prompt length: padding changes float sums, and a draw may then fall on the other side of a boundary
    requests = [asking(f"ab {i}", 100 + i, sampling) for i in range(8)]
    first = open_backend(TransformersBackend(batch=8), str(tmp_path)).respond(requests)
    second = open_backend(TransformersBackend(batch=3), str(tmp_path)).respond(requests[::-1])
    assert first == second[::-1]
    assert len({response.text for response in first}) == 8
    assert all(1 <= r.tokens <= 8 and (r.finish == "length") == (r.tokens == 8) for r in first)
    greedy = open_backend(TransformersBackend(), str(tmp_path)).respond(
        [asking("ab 0", s, Sampling(temperature=0, max_tokens=4)) for s in (1, 2)]
    )
    assert greedy[0] == greedy[1]
    long = asking("ab " * 200, 1, sampling)
    mixed = open_backend(TransformersBackend(batch=8), str(tmp_path)).respond(
        [*requests[:4], long, *requests[4:]]
    )
    assert mixed[:4] + mixed[5:] == first
    assert isinstance(mixed[4], Refusal) and "positions, of the 256 that the model has" in mixed[4].reason
    more = asking("ab", 1, Sampling(max_tokens=300))
    none = open_backend(TransformersBackend(), str(tmp_path)).respond([more])
    assert isinstance(none[0], Refusal)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_transformers_own_loop_says_the_same(tmp_path: Path, temperature: float) -> None:
    """Batches whose rows leave at their end give the tokens of `generate` on each prompt alone."""
    from transformers import AutoModelForCausalLM

    tiny_policy(tmp_path)
    sampling = Sampling(temperature=temperature, max_tokens=24)
    requests = [asking("x" * (1 + 3 * i), i, sampling) for i in range(16)]
    found = open_backend(TransformersBackend(batch=8), str(tmp_path)).respond(requests)
    tokenizer = load_tokenizer(str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stops = list(tokenizer.stop_ids)
    for request, response in zip(requests, found, strict=True):
        prompt = torch.tensor([prompt_ids(request, tokenizer)])
        draws = Draws([request.seed], sampling)
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            logits_processor=[lambda ids, scores, draws=draws: draws([0], scores)] if temperature else [],
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_id,
        )
        assert response == reply_of(
            output[0, prompt.shape[1] :].tolist(), stops, tokenizer, prompt[0].tolist()
        )
    assert len({response.tokens for response in found}) > 1 or not temperature


def test_draws_follow_the_probabilities() -> None:
    """For p = (0.1, 0.2, 0.7), 4,000 draws give 400, 800, 2,800 +- 4 sqrt(n p (1 - p)) at temperature 1.

    At temperature 0.5, p is squared and normalised to (0.01, 0.04, 0.49) / 0.54. The last one is 0.907.
    """
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(4000, 3)
    for temperature, expected in ((1.0, (0.1, 0.2, 0.7)), (0.5, (0.0185, 0.0741, 0.9074))):
        draws = Draws(range(4000), Sampling(temperature=temperature))
        counts = draws(range(4000), logits).argmax(-1).bincount(minlength=3)
        for count, p in zip(counts.tolist(), expected, strict=True):
            assert abs(count - 4000 * p) < 4 * (4000 * p * (1 - p)) ** 0.5


def test_nucleus_by_hand() -> None:
    """0.5 and 0.3 sum to 0.8. So top_p 0.8 keeps these two, 0.81 also the third, and 0.1 only the first."""
    logps = torch.tensor([[0.05, 0.5, 0.15, 0.3]], dtype=torch.float64).log()
    for top_p, kept in ((0.79, [1, 3]), (0.81, [1, 2, 3]), (0.1, [1])):
        assert nucleus(logps, top_p).isfinite().nonzero()[:, 1].tolist() == kept


def test_the_models_own_generation_file_changes_nothing(tmp_path: Path) -> None:
    """Beams and penalties of generation_config.json are ignored. Only the settings decide."""
    tiny_policy(tmp_path)
    drawn = []
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, max_tokens=8)
        requests = [asking("ab", seed, sampling) for seed in range(4)]
        (tmp_path / "generation_config.json").write_text("{}")
        plain = open_backend(TransformersBackend(), str(tmp_path)).respond(requests)
        (tmp_path / "generation_config.json").write_text(
            json.dumps({"repetition_penalty": 9.0, "num_beams": 3, "top_k": 1, "min_length": 90})
        )
        drawn.append((plain, open_backend(TransformersBackend(), str(tmp_path)).respond(requests)))
    assert all(plain == own for plain, own in drawn)


@pytest.mark.parametrize(
    ("ending", "text", "tokens", "finish"),
    [
        ([END_OF_TURN, "pad"], "ab", 3, "stop"),
        ([END_OF_MESSAGE], "ab", 3, "tool_calls"),
        ([END_OF_TEXT, END_OF_TURN], "ab", 3, "stop"),
        ([], "ab", 2, "length"),
    ],
)
def test_where_a_response_ends(
    tmp_path: Path, ending: list[str], text: str, tokens: int, finish: str
) -> None:
    """A response ends at the first stop token, which counts but is not in the text.

    A tool call is not a complete response.
    """
    tiny_policy(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = [*tokenizer.encode("a"), *tokenizer.encode("b")]
    ids += [tokenizer.pad_id if name == "pad" else tokenizer.special(name) for name in ending]
    assert reply_of(ids, tokenizer.stop_ids, tokenizer) == answer(text, tokens, finish)


def test_prompts_spell_content_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses keep them, because the rows that are trained later spell them again."""
    add_think(tiny_policy(tmp_path))
    named = load_tokenizer(tmp_path, content_tokens=THINK)
    think = named.encode("<think>")[0]
    asked: list[list[int]] = []

    def generated(self: Any, prompts: list[list[int]], *_: Any) -> list[Reply]:
        asked.extend(prompts)
        return [reply_of([think, self._tokenizer.special(END_OF_TURN)], named.stop_ids, self._tokenizer)]

    monkeypatch.setattr(Transformers, "_generate", generated)
    request = asking("<think>", 1, Sampling(max_tokens=9))
    for tokens, text in ((THINK, "<think>"), ((), "")):
        backend = open_backend(TransformersBackend(), str(tmp_path), tokens)
        assert backend.respond([request]) == [answer(text, 2)]
    assert [think in prompt for prompt in asked] == [True, False]
