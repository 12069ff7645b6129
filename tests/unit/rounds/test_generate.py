"""Generation: parts that are whole or absent, draws that depend on their own seed, and what is refused."""

import errno
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_post.config.load import ConfigError, parse
from megatron_post.data.tokenizer import END_OF_MESSAGE, END_OF_TEXT, END_OF_TURN, load_tokenizer
from megatron_post.rounds import generate as module
from megatron_post.rounds.backends import (
    BackendSettings,
    Failure,
    Request,
    Response,
    Sampling,
    ServerBackend,
    TransformersBackend,
    VllmBackend,
    _Transformers,
    nucleus,
    prompt_ids,
)
from megatron_post.rounds.backends import _Draws as Draws
from megatron_post.rounds.backends import _response as respond_with
from megatron_post.rounds.backends import open_backend as open_real
from megatron_post.rounds.failures import TooManyFailures, check_failures, failures_of, read_failures
from megatron_post.rounds.generate import Generate, generate, parts_of, read_samples, sample_seed, take_gpus
from megatron_post.storage.lock import only_process_in
from tests.unit.data.thinking import THINK, add_think
from tests.unit.rounds.models import tiny_policy

CONSOLE = Console(file=io.StringIO())


class Parrot:
    """Answers with the request itself, but not what is in `refuses`; fails at its n-th call."""

    def __init__(self, fails_at: int | None = None, refuses: Collection[str] = ()) -> None:
        self.calls, self._fails_at, self._refuses = 0, fails_at, refuses
        self.asked: list[str] = []

    def close(self) -> None:
        pass

    def respond(self, requests: Sequence[Request], sampling: Sampling) -> list[Response | Failure]:
        self.calls += 1
        if self.calls == self._fails_at:
            raise KeyboardInterrupt
        said = [f"{r.messages[-1]['content']} {r.seed}" for r in requests]
        self.asked += [r.messages[-1]["content"] for r in requests]
        return [
            Failure(f"no {r.messages[-1]['content']}")
            if r.messages[-1]["content"] in self._refuses
            else Response(text, 3, "stop")
            for r, text in zip(requests, said, strict=True)
        ]


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


def _refusing(*refuses: str, fails_at: int | None = None) -> Parrot:
    return Parrot(fails_at, {f"question {i}" for i in refuses})


def test_one_bad_prompt_is_a_counted_failure(tmp_path: Path) -> None:
    """Prompts 2 and 9 of 10 in parts of 4: written with their reasons, and not asked again by a call that
    goes on behind the first part. The output is that of an undisturbed call, byte for byte."""
    settings, said = _settings(tmp_path, max_failed=0.2), io.StringIO()
    console = Console(file=said, width=200)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    generate(settings, whole, console=console, open_backend=lambda *_: _refusing("1", "8"))
    assert "2 of 10 prompts failed" in said.getvalue()
    assert {row["prompt"] for row in read_samples(whole)} == set(range(1, 11)) - {2, 9}
    failed = [(row["prompt"], row["sample"], row["reason"]) for row in read_failures(whole)]
    assert failed == [(n + 1, k, f"no question {n}") for n in (1, 8) for k in range(3)]
    with pytest.raises(KeyboardInterrupt):
        generate(settings, output, console=CONSOLE, open_backend=lambda *_: _refusing("1", "8", fails_at=2))
    again = _refusing("1", "8")
    assert generate(settings, output, console=CONSOLE, open_backend=lambda *_: again) == 15
    assert "question 1" not in again.asked and "question 8" in again.asked
    assert output.read_bytes() == whole.read_bytes()
    assert failures_of(output).read_bytes() == failures_of(whole).read_bytes()
    output.unlink()  # nothing fails the next time, and nothing is left of the earlier failures
    generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot())
    assert not failures_of(output).exists() and read_failures(output) == []


def test_too_many_failures_end_it(tmp_path: Path) -> None:
    """By default 1 of 10 prompts may fail. What exceeds it is asked again, by a server that was mended, and
    `max_failed` may be raised."""
    settings, output = _settings(tmp_path), tmp_path / "out.jsonl"
    reason = (
        r"2 of 10 prompts failed, and max_failed=0.01 allows 1. The first was prompt 2: no question 1.*same"
    )
    with pytest.raises(TooManyFailures, match=reason):
        generate(settings, output, console=CONSOLE, open_backend=lambda *_: _refusing("1", "8"))
    assert sorted(p.name for p in parts_of(output).glob("part-*")) == [
        "part-000000.jsonl",
        "part-000001.jsonl",
    ]
    mended = Parrot()
    more = settings.model_copy(update={"max_failed": 0.5})
    assert generate(more, output, console=CONSOLE, open_backend=lambda *_: mended) == 6
    assert set(mended.asked) == {"question 8", "question 9"}
    assert {row["prompt"] for row in read_failures(output)} == {2}


@pytest.mark.parametrize(("share", "allowed"), [(0.0, 0), (0.01, 1), (0.1, 1), (0.11, 2), (0.3, 3), (1.0, 9)])
def test_how_many_of_ten_may_fail(share: float, allowed: int) -> None:
    """Rounded up, and never all: 0.3 x 10 is 3, and not the 4 of a rounding error."""
    failed = [{"prompt": number, "reason": "no"} for number in range(allowed)]
    check_failures(failed, prompts=10, max_failed=share)
    with pytest.raises(TooManyFailures, match=f"{allowed + 1} of 10 .* allows {allowed}"):
        check_failures([*failed, {"prompt": 99, "reason": "no"}], prompts=10, max_failed=share)


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, calls = _settings(tmp_path), iter(range(100))
    real = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == 4:  # the settings, the first part and its failures, the next failures, and then
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    backend = Parrot()
    with pytest.raises(ValueError, match=r"part-000001.jsonl: No space left.*is kept.*same command"):
        generate(settings, tmp_path / "out.jsonl", console=CONSOLE, open_backend=lambda *_: backend)
    assert [p.name for p in (tmp_path / ".partial-out.jsonl").glob("part-*")] == ["part-000000.jsonl"]
    assert [p.name for p in (tmp_path / ".partial-out.jsonl").glob(".*")] == [".lock"]
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
    long = Request(({"role": "user", "content": "ab " * 200},), seed=1)
    mixed = open_real(TransformersBackend(batch=8), str(tmp_path)).respond(
        [*requests[:4], long, *requests[4:]], sampling
    )
    assert mixed[:4] + mixed[5:] == first
    assert isinstance(mixed[4], Failure) and "positions, of the 256 that the model has" in mixed[4].reason
    none = open_real(TransformersBackend(), str(tmp_path)).respond(requests[:1], Sampling(max_tokens=300))
    assert isinstance(none[0], Failure)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_transformers_own_loop_says_the_same(tmp_path: Path, temperature: float) -> None:
    """Rows that leave a batch as they end, beside `generate` on each prompt alone, token for token."""
    from transformers import AutoModelForCausalLM

    tiny_policy(tmp_path)
    sampling = Sampling(temperature=temperature, max_tokens=24)
    requests = [Request(({"role": "user", "content": "x" * (1 + 3 * i)},), seed=i) for i in range(16)]
    found = open_real(TransformersBackend(batch=8), str(tmp_path)).respond(requests, sampling)
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
        assert response == respond_with(output[0, prompt.shape[1] :].tolist(), stops, tokenizer)
    assert len({response.tokens for response in found}) > 1 or not temperature


def test_draws_follow_the_probabilities() -> None:
    """p = (0.1, 0.2, 0.7) at temperature 1: of 4,000 draws 400, 800, 2,800 +- 4 sqrt(n p (1 - p)).

    At temperature 0.5 p is squared and normalised: (0.01, 0.04, 0.49) / 0.54, of which the last is 0.907.
    """
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(4000, 3)
    for temperature, expected in ((1.0, (0.1, 0.2, 0.7)), (0.5, (0.0185, 0.0741, 0.9074))):
        draws = Draws(range(4000), Sampling(temperature=temperature))
        counts = draws(range(4000), logits).argmax(-1).bincount(minlength=3)
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
    with pytest.raises(ValueError, match=r"backend vllm: .*pip install .*\[generate\]"):
        generate(_settings(tmp_path, backend={"kind": "vllm"}), tmp_path / "out", console=CONSOLE)


def test_other_tokenizers_stop_tokens(tmp_path: Path) -> None:
    settings = _settings(tmp_path, sampling={"stop": ["</s>"], "max_tokens": 8})
    with pytest.raises(ValueError, match="the tokenizer has none of these"):
        generate(settings, tmp_path / "out", console=CONSOLE)


def test_models_come_from_directories(tmp_path: Path) -> None:
    settings = _settings(tmp_path, model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        generate(settings, tmp_path / "out", console=CONSOLE)
    tiny_policy(tmp_path / "reward", scalar_head=True)
    settings = _settings(tmp_path, model=str(tmp_path / "reward"))
    with pytest.raises(ValueError, match="reward is a reward model"):
        generate(settings, tmp_path / "out", console=CONSOLE)


def test_other_parts_the_same_responses(tmp_path: Path) -> None:
    """Prompts of one length: the model sees the same widths, however many prompts a part has."""
    settings = _settings(tmp_path, sampling={"samples": 2, "max_tokens": 6})
    written = []
    for part in (1, 3, 10):
        output = tmp_path / f"{part}.jsonl"
        assert generate(settings.model_copy(update={"part": part}), output, console=CONSOLE) == 20
        written.append(output.read_bytes())
    assert written[0] == written[1] == written[2]
    assert len({row["messages"][-1]["content"] for row in read_samples(output)}) > 10


def test_killed_after_the_last_write(tmp_path: Path) -> None:
    """The output is whole and its parts are still there: the same call clears them away and is content."""
    settings, output = _settings(tmp_path), tmp_path / "out.jsonl"
    generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot())
    parts_of(output).mkdir()
    (parts_of(output) / "part-000000.jsonl").touch()
    assert generate(settings, output, console=CONSOLE) == 0
    assert not parts_of(output).exists()


def test_a_call_that_failed_early_claims_nothing(tmp_path: Path) -> None:
    """Before the first part is there, settings may be mended."""
    settings, output = _settings(tmp_path), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot(fails_at=1))
    mended = settings.model_copy(update={"sampling": Sampling(samples=1)})
    assert generate(mended, output, console=CONSOLE, open_backend=lambda *_: Parrot()) == 10


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with only_process_in(parts_of(output)), pytest.raises(ValueError, match="another process works here"):
        generate(_settings(tmp_path), output, console=CONSOLE, open_backend=lambda *_: Parrot())


def test_ranks_draw_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 ranks, here threads, finish the 5 parts of a process that was stopped after the first: the output of
    one that was not, nothing drawn twice, and all return when it is there."""
    settings, output = _settings(tmp_path, part=2), tmp_path / "out.jsonl"
    backend = lambda *_: _refusing("3")  # noqa: E731 - of each of them
    generate(settings, tmp_path / "whole.jsonl", console=CONSOLE, open_backend=backend)
    with pytest.raises(KeyboardInterrupt):
        generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot(fails_at=2))
    local = threading.local()
    monkeypatch.setattr(module, "rank_from_environment", lambda: (local.rank, 3, local.rank))
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOOKS", 0.01)

    def draw(rank: int) -> tuple[int, bool]:
        local.rank = rank
        console = Console(file=io.StringIO(), width=200)
        written = generate(settings, output, console=console, open_backend=backend)
        return written, output.exists()

    with ThreadPoolExecutor(3) as pool:
        followers = [pool.submit(draw, rank) for rank in (1, 2)]
        time.sleep(0.2)
        assert not any(future.done() for future in followers)
        assert pool.submit(draw, 0).result(60) == (6, True)
        assert [future.result(60) for future in followers] == [(9, True), (6, True)]
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert read_failures(output) == read_failures(tmp_path / "whole.jsonl") != []
    assert not parts_of(output).exists()
    local.rank = 2  # starts when all is over
    assert generate(settings, output, console=CONSOLE) == 0


@pytest.mark.parametrize(
    ("visible", "backend", "own"),
    [
        (None, TransformersBackend(), 3),
        ("8,9,10,11", VllmBackend(kind="vllm"), "11"),
        (None, VllmBackend(kind="vllm", tensor_parallel=2), "6,7"),
        (None, VllmBackend(kind="vllm", tensor_parallel=4), None),
        ("0", TransformersBackend(), None),
        (None, ServerBackend(kind="server", url="http://x/v1", served_model="m"), ""),
    ],
)
def test_whose_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, backend: BackendSettings, own: str | int | None
) -> None:
    """Of rank 3 on a node of 8 GPUs: a device for this process, or a variable for those that it starts."""
    devices: list[int] = []
    monkeypatch.setattr(module, "rank_from_environment", lambda: (11, 16, 3))
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if own is None:
        with pytest.raises(
            ValueError, match=r"GPUs (12 to 15, and sees 8|3 to 3, and sees 1): let every rank"
        ):
            take_gpus(backend)
        return
    take_gpus(backend)
    assert devices == ([own] if isinstance(own, int) else [])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == (own if isinstance(own, str) else "")
    assert ("TORCHELASTIC_USE_AGENT_STORE" in os.environ) == (not isinstance(backend, VllmBackend))


def test_a_log_tells_of_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no terminal for a bar: 4, 8 and 10 prompts of 10, if a line is due each time."""
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
    said = io.StringIO()
    generate(
        _settings(tmp_path),
        tmp_path / "out.jsonl",
        console=Console(file=said, width=200),
        open_backend=lambda *_: Parrot(),
    )
    lines = said.getvalue().splitlines()
    assert [line.split(" prompts, ")[0] for line in lines[:3]] == ["4 of 10", "8 of 10", "10 of 10"]
    assert all("tokens/s" in line for line in lines) and "30 responses, 90 tokens" in lines[3]


def test_the_models_own_generation_file_changes_nothing(tmp_path: Path) -> None:
    """Beams and penalties of generation_config.json are no part of the settings, which decide alone."""
    tiny_policy(tmp_path)
    requests = [Request(({"role": "user", "content": "ab"},), seed=seed) for seed in range(4)]
    drawn = []
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, max_tokens=8)
        (tmp_path / "generation_config.json").write_text("{}")
        plain = open_real(TransformersBackend(), str(tmp_path)).respond(requests, sampling)
        (tmp_path / "generation_config.json").write_text(
            json.dumps({"repetition_penalty": 9.0, "num_beams": 3, "top_k": 1, "min_length": 90})
        )
        drawn.append((plain, open_real(TransformersBackend(), str(tmp_path)).respond(requests, sampling)))
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
    """At the first stop token, which counts and is not said; what asks for a tool is no whole response."""
    tiny_policy(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = [*tokenizer.encode("a"), *tokenizer.encode("b")]
    ids += [tokenizer.pad_id if name == "pad" else tokenizer.special(name) for name in ending]
    assert respond_with(ids, tokenizer.stop_ids, tokenizer) == Response(text, tokens, finish)


def test_prompts_spell_content_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And responses keep them, for what is trained on later spells them again."""
    add_think(tiny_policy(tmp_path))
    named = load_tokenizer(tmp_path, content_tokens=THINK)
    think = named.encode("<think>")[0]
    asked: list[list[int]] = []

    def generated(self: Any, prompts: list[list[int]], *_: Any) -> list[Response]:
        asked.extend(prompts)
        return [respond_with([think, self._tokenizer.special(END_OF_TURN)], named.stop_ids, self._tokenizer)]

    monkeypatch.setattr(_Transformers, "_generate", generated)
    request = Request(({"role": "user", "content": "<think>"},), seed=1)
    for tokens, text in ((THINK, "<think>"), ((), "")):
        backend = open_real(TransformersBackend(), str(tmp_path), tokens)
        assert backend.respond([request], Sampling(max_tokens=9)) == [Response(text, 2, "stop")]
    assert [think in prompt for prompt in asked] == [True, False]
    server = {"kind": "server", "url": "http://x/v1", "served_model": "m"}
    with pytest.raises(ConfigError, match="content_tokens: a server renders prompts with its own tokenizer"):
        _settings(tmp_path / "more", backend=server, content_tokens=["<think>"])


def test_what_vllm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names in the sources of vLLM 0.32; the engine has never run here. Closing ends its processes."""
    asked: dict[str, Any] = {}
    for name in ("ENABLE_V1_MULTIPROCESSING", "WORKER_MULTIPROC_METHOD", "NO_USAGE_STATS", "CACHE_ROOT"):
        monkeypatch.setenv(f"VLLM_{name}", "")  # what is set here is gone behind the test
    monkeypatch.delenv("VLLM_CACHE_ROOT")

    class SamplingParams:
        def __init__(
            self, *, temperature: float, top_p: float, max_tokens: int, seed: int, stop_token_ids: list[int],
            ignore_eos: bool, detokenize: bool,
        ) -> None:  # fmt: skip
            assert ignore_eos and not detokenize
            self.values = (temperature, top_p, max_tokens, seed, tuple(stop_token_ids))

    class LLM:
        def __init__(
            self, model: str, *, tensor_parallel_size: int, quantization: str | None,
            gpu_memory_utilization: float, enable_prefix_caching: bool, max_model_len: int,
            trust_remote_code: bool, load_format: str,
        ) -> None:  # fmt: skip
            assert not trust_remote_code and load_format == "safetensors"
            if quantization == "none":
                raise RuntimeError("Engine core initialization failed.")
            asked["engine"] = (model, tensor_parallel_size, quantization, gpu_memory_utilization)
            assert enable_prefix_caching and max_model_len == -1
            self.model_config = SimpleNamespace(max_model_len=64)
            core = SimpleNamespace(shutdown=lambda timeout: asked.update(ended=timeout))
            self.llm_engine = SimpleNamespace(engine_core=core)

        def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool) -> list[Any]:
            asked["prompts"], asked["sampling"] = prompts, [p.values for p in sampling_params]
            ids = [*tokenizer.encode("a"), tokenizer.special(END_OF_TURN)]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams))
    tiny_policy(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    backend = open_real(VllmBackend(kind="vllm", tensor_parallel=2, quantization="mxfp8"), str(tmp_path))
    requests = [Request(({"role": "user", "content": "?"},), seed=seed) for seed in (5, 2**62)]
    found = backend.respond(requests, Sampling(temperature=0.5, top_p=0.9, max_tokens=7))
    assert found == [Response("a", 2, "stop")] * 2
    assert asked["engine"] == (str(tmp_path), 2, "mxfp8", 0.9)
    assert [values[:4] for values in asked["sampling"]] == [(0.5, 0.9, 7, 5), (0.5, 0.9, 7, 2**62)]
    assert set(asked["sampling"][0][4]) == set(tokenizer.stop_ids)
    long = Request(({"role": "user", "content": "?" * 64},), seed=6)
    failed, *found = backend.respond([long, *requests], Sampling(max_tokens=7))
    assert found == [Response("a", 2, "stop")] * 2 and len(asked["prompts"]) == 2
    assert isinstance(failed, Failure) and "positions, of the 64 that the model has" in failed.reason
    handler = signal.getsignal(signal.SIGTERM)
    assert callable(handler) and os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    backend.close()
    assert asked["ended"] == 120 and signal.getsignal(signal.SIGTERM) != handler
    with pytest.raises(ValueError, match=r"vLLM did not start on .*: Engine core initialization failed"):
        open_real(VllmBackend(kind="vllm", quantization="none"), str(tmp_path))
    assert signal.getsignal(signal.SIGTERM) != handler
    shown = tokenizer.decode(asked["prompts"][0]["prompt_token_ids"])
    assert shown.startswith("<|begin_of_text|>") and shown.endswith("assistant<|end_header_id|>\n\n")
