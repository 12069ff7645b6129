"""Tests of the backend on vLLM's engine, with a stand-in that has the names of vLLM's sources."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_post.data.special_tokens import END_OF_TURN
from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.inference.backend import open_backend
from megatron_post.inference.request import Refusal, Sampling
from megatron_post.inference.settings import VllmBackend
from megatron_post.inference.tokens import prompt_ids
from tests.unit.inference.asking import answer, asking
from tests.unit.rounds.models import tiny_policy


def test_what_vllm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are from vLLM 0.32's sources. The engine has never run here. `close` ends its processes."""
    asked: dict[str, Any] = {}
    for name in ("ENABLE_V1_MULTIPROCESSING", "WORKER_MULTIPROC_METHOD", "NO_USAGE_STATS", "CACHE_ROOT"):
        monkeypatch.setenv(f"VLLM_{name}", "")  # monkeypatch restores the variables after the test
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
    backend = open_backend(VllmBackend(kind="vllm", tensor_parallel=2, quantization="mxfp8"), str(tmp_path))
    sampling = Sampling(temperature=0.5, top_p=0.9, max_tokens=7)
    requests = [asking("?", seed, sampling) for seed in (5, 2**62)]
    found = backend.respond(requests)
    expected = answer("a", 2, prompt_tokens=len(prompt_ids(requests[0], tokenizer)))
    assert found == [expected] * 2
    assert asked["engine"] == (str(tmp_path), 2, "mxfp8", 0.9)
    assert [values[:4] for values in asked["sampling"]] == [(0.5, 0.9, 7, 5), (0.5, 0.9, 7, 2**62)]
    assert set(asked["sampling"][0][4]) == set(tokenizer.stop_ids)
    long = asking("?" * 64, 6, Sampling(max_tokens=7))
    failed, *found = backend.respond([long, *requests])
    assert found == [expected] * 2 and len(asked["prompts"]) == 2
    assert isinstance(failed, Refusal) and "positions, of the 64 that the model has" in failed.reason
    handler = signal.getsignal(signal.SIGTERM)
    assert callable(handler) and os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    backend.close()
    assert asked["ended"] == 120 and signal.getsignal(signal.SIGTERM) != handler
    with pytest.raises(ValueError, match=r"vLLM did not start on .*: Engine core initialization failed"):
        open_backend(VllmBackend(kind="vllm", quantization="none"), str(tmp_path))
    assert signal.getsignal(signal.SIGTERM) != handler
    shown = tokenizer.decode(asked["prompts"][0]["prompt_token_ids"])
    assert shown.startswith("<|begin_of_text|>") and shown.endswith("assistant<|end_header_id|>\n\n")
