"""Generation: parts that are whole or absent, draws that depend on their own seed, and what is refused."""

import errno
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_post.config.load import ConfigError, parse
from megatron_post.rounds.backends import Request, Response, Sampling, TransformersBackend, nucleus
from megatron_post.rounds.backends import _Draws as Draws
from megatron_post.rounds.backends import open_backend as open_real
from megatron_post.rounds.generate import Generate, generate, read_samples, sample_seed
from megatron_post.rounds.prompts import read_prompts
from tests.unit.rounds.models import tiny_policy

CONSOLE = Console(file=io.StringIO())


class Parrot:
    """Answers with the request itself; fails at its n-th call."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self._fails_at = 0, fails_at

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        self.calls += 1
        if self.calls == self._fails_at:
            raise KeyboardInterrupt
        return [Response(f"{r.messages[-1]['content']} {r.seed}", 3, "stop") for r in requests]


def _prompts(path: Path, count: int = 10) -> Path:
    rows = [{"prompt": f"question {i}", "capability": "math" if i % 2 else "chat"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _settings(tmp_path: Path, **more: Any) -> Generate:
    if not (tmp_path / "model").exists():
        tiny_policy(tmp_path / "model")
        _prompts(tmp_path / "prompts.jsonl")
    values = {
        "model": str(tmp_path / "model"),
        "prompts": str(tmp_path / "prompts.jsonl"),
        "sampling": {"samples": 3},
        "part": 4,
    }
    return parse(Generate, {**values, **more}, origin="test")


def test_an_interrupted_generation_goes_on(tmp_path: Path) -> None:
    """10 prompts in parts of 4, 4, 2: stopped in the second, the next call makes the second and third."""
    settings = _settings(tmp_path, system={"math": "Count.", "default": "Be kind."})
    whole = generate(settings, tmp_path / "whole.jsonl", console=CONSOLE, open_backend=lambda *_: Parrot())
    assert whole == 30
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot(fails_at=2))
    assert not output.exists()
    other = settings.model_copy(update={"sampling": Sampling(samples=2)})
    with pytest.raises(ValueError, match="unfinished generation with other settings"):
        generate(other, output, console=CONSOLE, open_backend=lambda *_: Parrot())
    assert generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot()) == 18
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    rows = read_samples(output)
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        (p, k) for p in range(1, 11) for k in range(3)
    ]
    assert [m["content"] for m in rows[3]["messages"][:2]] == ["Count.", "question 1"]
    assert rows[0]["messages"][0]["content"] == "Be kind."
    assert rows[4]["messages"][-1]["content"] == f"question 1 {sample_seed(0, 2, 1)}"
    assert not list(tmp_path.glob(".partial*"))
    with pytest.raises(ValueError, match="exists already"):
        generate(settings, output, console=CONSOLE)


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, calls = _settings(tmp_path), iter(range(100))
    real = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == 2:  # the settings, the first part, and then
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    backend = Parrot()
    with pytest.raises(ValueError, match=r"part-000001.jsonl: No space left.*is kept.*same command"):
        generate(settings, tmp_path / "out.jsonl", console=CONSOLE, open_backend=lambda *_: backend)
    assert [p.name for p in (tmp_path / ".partial-out.jsonl").glob("*.jsonl")] == ["part-000000.jsonl"]
    assert not list((tmp_path / ".partial-out.jsonl").glob(".*"))
    assert generate(settings, tmp_path / "out.jsonl", console=CONSOLE, open_backend=lambda *_: backend) == 18


def test_transformers_draws_by_seed_alone(tmp_path: Path) -> None:
    """The same responses in other batches and in another order; greedy is the same for all samples."""
    tiny_policy(tmp_path)
    # one prompt length: padding changes float sums, and a draw may then fall on the other side of a boundary
    requests = [Request(({"role": "user", "content": f"ab {i}"},), seed=100 + i) for i in range(8)]
    sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=8)
    first = open_real(TransformersBackend(batch=8), str(tmp_path)).respond(requests, sampling)
    second = open_real(TransformersBackend(batch=3), str(tmp_path)).respond(requests[::-1], sampling)
    assert first == second[::-1]
    assert len({response.text for response in first}) == 8
    assert all(1 <= r.tokens <= 8 and (r.finish == "length") == (r.tokens == 8) for r in first)
    greedy = open_real(TransformersBackend(), str(tmp_path)).respond(
        [Request(requests[0].messages, seed=s) for s in (1, 2)], Sampling(temperature=0, max_tokens=4)
    )
    assert greedy[0] == greedy[1]
    with pytest.raises(ValueError, match=r"take .* positions, of the 256"):
        open_real(TransformersBackend(), str(tmp_path)).respond(requests, Sampling(max_tokens=300))


def test_draws_follow_the_probabilities() -> None:
    """p = (0.1, 0.2, 0.7) at temperature 1: of 4,000 draws 400, 800, 2,800 +- 4 sqrt(n p (1 - p)).

    At temperature 0.5 p is squared and normalised: (0.01, 0.04, 0.49) / 0.54, of which the last is 0.907.
    """
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(4000, 3)
    for temperature, expected in ((1.0, (0.1, 0.2, 0.7)), (0.5, (0.0185, 0.0741, 0.9074))):
        draws = Draws(range(4000), Sampling(temperature=temperature))
        counts = draws(torch.zeros(0), logits).argmax(-1).bincount(minlength=3)
        for count, p in zip(counts.tolist(), expected, strict=True):
            assert abs(count - 4000 * p) < 4 * (4000 * p * (1 - p)) ** 0.5


def test_nucleus_by_hand() -> None:
    """0.5 and 0.3 have 0.8 together: top_p 0.8 keeps these two, 0.81 the third too, and 0.1 the first."""
    logps = torch.tensor([[0.05, 0.5, 0.15, 0.3]], dtype=torch.float64).log()
    for top_p, kept in ((0.79, [1, 3]), (0.81, [1, 2, 3]), (0.1, [1])):
        assert nucleus(logps, top_p).isfinite().nonzero()[:, 1].tolist() == kept


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampling": {"samples": 0}}, "sampling.samples: .*greater than 0.*got 0"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"backend": {"kind": "oracle"}}, "oracle"),
        ({"sample": 3}, "sample: unknown key"),
    ],
)
def test_bad_settings(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _settings(tmp_path, **values)


def test_vllm_is_named_where_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backend vllm: .*megatron-post\[generate\]"):
        generate(_settings(tmp_path, backend={"kind": "vllm"}), tmp_path / "out", console=CONSOLE)


def test_other_tokenizers_stop_tokens(tmp_path: Path) -> None:
    settings = _settings(tmp_path, sampling={"stop": ["</s>"], "max_tokens": 8})
    with pytest.raises(ValueError, match="the tokenizer has none of these"):
        generate(settings, tmp_path / "out", console=CONSOLE)


def test_broken_prompts_are_named(tmp_path: Path) -> None:
    lines = [
        b'{"prompt": "fine"}',
        b"{broken",
        b'{"prompt": "\xff"}',
        b'{"question": "?"}',
        b'{"prompt": "x", "anwser": "1"}',
        b'{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
        b'{"prompt": " "}',
        b'{"prompt": "x", "answer": [1]}',
        b'{"prompt": "lone \\ud800"}',
        b"",
        b'{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": " x "}], "answer": 7}',
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"1 bad row.*\n.*prompts.jsonl:2: not JSON"):
        read_prompts(path)
    prompts = read_prompts(path, max_bad_rows=8)
    assert [(p.number, p.messages[-1]["content"], p.answer) for p in prompts] == [
        (1, "fine", None),
        (11, "x", "7"),
    ]
    assert prompts[1].with_system({"default": "other"}) == prompts[1].messages
    with pytest.raises(ValueError, match="none is left after skipping 2"):
        read_prompts(path, max_bad_rows=8, skip=2)
    with pytest.raises(ValueError, match="no such file"):
        read_prompts(tmp_path / "none")


def test_models_come_from_directories(tmp_path: Path) -> None:
    settings = _settings(tmp_path, model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere is no directory"):
        generate(settings, tmp_path / "out", console=CONSOLE)
