"""Tests of `generate`, of interruptions, of failed prompts, and of invalid settings."""

import io
import json
import os
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_post import progress
from megatron_post.config.load import ConfigError, parse
from megatron_post.inference import generate as module
from megatron_post.inference import ranks
from megatron_post.inference.failures import TooManyFailures, check_failures, failures_of, read_failures
from megatron_post.inference.generate import Generate, generate, parts_of
from megatron_post.inference.journal import Journal
from megatron_post.inference.ranks import take_gpus
from megatron_post.inference.request import Refusal, Reply, Request
from megatron_post.inference.samples import read_samples, sample_seed
from megatron_post.inference.settings import (
    BackendSettings,
    SamplesPerPrompt,
    ServerBackend,
    TransformersBackend,
    VllmBackend,
)
from tests.unit.inference.asking import answer
from tests.unit.rounds.models import tiny_policy

CONSOLE = Console(file=io.StringIO())


class Parrot:
    """Answers with the request itself, refuses the texts in `refuses`, and fails at its n-th call."""

    def __init__(self, fails_at: int | None = None, refuses: Collection[str] = ()) -> None:
        self.calls, self._fails_at, self._refuses = 0, fails_at, refuses
        self.asked: list[str] = []

    def close(self) -> None:
        pass

    def respond(self, requests: Sequence[Request]) -> list[Reply | Refusal]:
        self.calls += 1
        if self.calls == self._fails_at:
            raise KeyboardInterrupt
        said = [f"{r.messages[-1].content} {r.seed}" for r in requests]
        self.asked += [r.messages[-1].content for r in requests]
        return [
            Refusal(f"no {r.messages[-1].content}")
            if r.messages[-1].content in self._refuses
            else answer(text, 3)
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
    """10 prompts are in parts of 4, 4 and 2. After a stop in the second, a call generates the rest."""
    settings = _settings(tmp_path, system={"math": "Count.", "default": "Be kind."})
    whole = generate(settings, tmp_path / "whole.jsonl", console=CONSOLE, open_backend=lambda *_: Parrot())
    assert whole.written == 30
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot(fails_at=2))
    assert not output.exists()
    other = settings.model_copy(update={"sampling": SamplesPerPrompt(samples=2)})
    with pytest.raises(ValueError, match="unfinished generation with other settings"):
        generate(other, output, console=CONSOLE, open_backend=lambda *_: Parrot())
    assert generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot()).written == 18
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
    """Prompts 2 and 9 of 10 fail, in parts of 4.

    They are written with their reasons, and a call that continues after the first part does not send them
    again. The output equals that of an undisturbed call, byte for byte.
    """
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
    assert generate(settings, output, console=CONSOLE, open_backend=lambda *_: again).written == 15
    assert "question 1" not in again.asked and "question 8" in again.asked
    assert output.read_bytes() == whole.read_bytes()
    assert failures_of(output).read_bytes() == failures_of(whole).read_bytes()
    output.unlink()  # nothing fails the next time, so the file of earlier failures is removed
    generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot())
    assert not failures_of(output).exists() and read_failures(output) == []


def test_too_many_failures_end_it(tmp_path: Path) -> None:
    """By default 1 of 10 prompts may fail.

    A refusal above the limit is sent again after the server has been mended, and `max_failed` may be raised.
    """
    settings, output = _settings(tmp_path), tmp_path / "out.jsonl"
    reason = (
        r"2 of 10 prompts failed, and max_failed=0.01 allows 1. The first was prompt 2: no question 1.*same"
    )
    with pytest.raises(TooManyFailures, match=reason):
        generate(settings, output, console=CONSOLE, open_backend=lambda *_: _refusing("1", "8"))
    with Journal(parts_of(output)) as journal:
        assert len(journal) == 24  # 8 prompts, and the first ones are refused
    mended = Parrot()
    more = settings.model_copy(update={"max_failed": 0.5})
    assert generate(more, output, console=CONSOLE, open_backend=lambda *_: mended).written == 6
    assert set(mended.asked) == {"question 8", "question 9"}
    assert {row["prompt"] for row in read_failures(output)} == {2}


@pytest.mark.parametrize(("share", "allowed"), [(0.0, 0), (0.01, 1), (0.1, 1), (0.11, 2), (0.3, 3), (1.0, 9)])
def test_how_many_of_ten_may_fail(share: float, allowed: int) -> None:
    """The number is rounded up and never all. 0.3 x 10 is 3, and not the 4 of a rounding error."""
    failed = [{"prompt": number, "reason": "no"} for number in range(allowed)]
    check_failures(failed, prompts=10, max_failed=share)
    with pytest.raises(TooManyFailures, match=f"{allowed + 1} of 10 .* allows {allowed}"):
        check_failures([*failed, {"prompt": 99, "reason": "no"}], prompts=10, max_failed=share)


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
    """The prompts have the same length, so the widths of batches do not depend on the size of parts."""
    settings = _settings(tmp_path, sampling={"samples": 2, "max_tokens": 6})
    written = []
    for part in (1, 3, 10):
        output = tmp_path / f"{part}.jsonl"
        assert generate(settings.model_copy(update={"part": part}), output, console=CONSOLE).written == 20
        written.append(output.read_bytes())
    assert written[0] == written[1] == written[2]
    assert len({row["messages"][-1]["content"] for row in read_samples(output)}) > 10


def test_killed_after_the_last_write(tmp_path: Path) -> None:
    """The output is complete, and its journal still exists. The same call removes the journal."""
    settings, output = _settings(tmp_path), tmp_path / "out.jsonl"
    generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot())
    parts_of(output).mkdir()
    (parts_of(output) / "journal-00000.jsonl").touch()
    assert generate(settings, output, console=CONSOLE).written == 0
    assert not parts_of(output).exists()


def test_a_call_that_failed_early_claims_nothing(tmp_path: Path) -> None:
    """Without an answer, the settings may still be changed."""
    settings, output = _settings(tmp_path), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot(fails_at=1))
    mended = settings.model_copy(update={"sampling": SamplesPerPrompt(samples=1)})
    assert generate(mended, output, console=CONSOLE, open_backend=lambda *_: Parrot()).written == 10


def test_prompts_may_be_added_to_an_unfinished_generation(tmp_path: Path) -> None:
    """4 of 10 prompts are answered when it is stopped. With 2 more prompts, 8 are asked for."""
    settings, output, backend = _settings(tmp_path), tmp_path / "out.jsonl", Parrot()
    with pytest.raises(KeyboardInterrupt):
        generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot(fails_at=2))
    _prompts(tmp_path / "prompts.jsonl", 12)
    assert generate(settings, output, console=CONSOLE, open_backend=lambda *_: backend).written == 24
    assert set(backend.asked) == {f"question {i}" for i in range(4, 12)}
    generate(settings, tmp_path / "whole.jsonl", console=CONSOLE, open_backend=lambda *_: Parrot())
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_rank_that_starts_as_the_others_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 removes the record while this rank opens its journal. Nothing is left behind."""
    settings, output = _settings(tmp_path), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot(fails_at=2))

    def finished_meanwhile(directory: Path, writer: int) -> Journal:
        (directory / "settings.json").unlink()
        output.touch()
        return Journal(directory, writer)

    monkeypatch.setattr(module, "rank_from_environment", lambda: (1, 2, 1))
    monkeypatch.setattr(module, "Journal", finished_meanwhile)
    assert generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot()).written == 0
    assert not parts_of(output).exists()


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    refused = "journal-00000.jsonl is being written by process"
    with Journal(parts_of(output)), pytest.raises(ValueError, match=refused):
        generate(_settings(tmp_path), output, console=CONSOLE, open_backend=lambda *_: Parrot())


def test_ranks_draw_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 ranks, here threads, finish the 5 parts of a process that was stopped after the first part.

    The output equals that of an undisturbed process, no response is generated twice, and all ranks return.
    """
    settings, output = _settings(tmp_path, part=2), tmp_path / "out.jsonl"
    backend = lambda *_: _refusing("3")  # noqa: E731 - of each of them
    generate(settings, tmp_path / "whole.jsonl", console=CONSOLE, open_backend=backend)
    with pytest.raises(KeyboardInterrupt):
        generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot(fails_at=2))
    local = threading.local()
    for each in (module, ranks):
        monkeypatch.setattr(each, "rank_from_environment", lambda: (local.rank, 3, local.rank))
    monkeypatch.setattr(ranks, "_SECONDS_BETWEEN_LOOKS", 0.01)

    def draw(rank: int) -> tuple[int, bool]:
        local.rank = rank
        console = Console(file=io.StringIO(), width=200)
        written = generate(settings, output, console=console, open_backend=backend)
        return written.written, output.exists()

    with ThreadPoolExecutor(3) as pool:
        followers = [pool.submit(draw, rank) for rank in (1, 2)]
        time.sleep(0.2)
        assert not any(future.done() for future in followers)
        assert pool.submit(draw, 0).result(60) == (6, True)
        assert [future.result(60) for future in followers] == [(9, True), (6, True)]
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert read_failures(output) == read_failures(tmp_path / "whole.jsonl") != []
    assert not parts_of(output).exists()
    local.rank = 2  # starts when the output is complete
    assert generate(settings, output, console=CONSOLE).written == 0


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
    """Rank 3 on a node of 8 GPUs sets a device for this process, or a variable for its child processes."""
    devices: list[int] = []
    monkeypatch.setattr(ranks, "rank_from_environment", lambda: (11, 16, 3))
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
    """Without a terminal there are lines with 4, 8 and 10 of 10 prompts, if a line is printed each time."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    said = io.StringIO()
    generate(
        _settings(tmp_path),
        tmp_path / "out.jsonl",
        console=Console(file=said, width=200),
        open_backend=lambda *_: Parrot(),
    )
    lines = said.getvalue().splitlines()
    assert [line.split(" prompts, ")[0] for line in lines[:3]] == [
        f"generating: {done} of 10" for done in (4, 8, 10)
    ]
    assert all("tokens/s" in line for line in lines) and "30 responses, 90 tokens" in lines[3]


def test_a_server_has_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    server = {"kind": "server", "url": "http://x/v1", "served_model": "m"}
    with pytest.raises(ConfigError, match="content_tokens: a server renders prompts with its own tokenizer"):
        _settings(tmp_path / "more", backend=server, content_tokens=["<think>"])
