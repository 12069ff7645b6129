"""Generates with vLLM's offline engine."""

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.inference.request import Refusal, Reply, Request
from megatron_post.inference.settings import VllmBackend
from megatron_post.inference.tokens import overlong, prompt_ids, reply_of, stop_ids
from megatron_post.installation import install_command
from megatron_post.parallel.environment import rank_from_environment

_SECONDS_TO_END = 120.0  # for vLLM's processes to end


class Vllm:
    """A backend on vLLM's offline engine. Its prefix cache computes a prompt once for all samples.

    It was written from the sources of vLLM 0.32, and has not been run with vLLM.
    """

    def __init__(self, settings: VllmBackend, model: str, content_tokens: Sequence[str]) -> None:
        _, _, local_rank = rank_from_environment()
        os.environ |= {
            # The engine runs in a process of its own, so that its end frees the GPUs. The process is spawned,
            # because a forked one fails if this process has initialised CUDA.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_NO_USAGE_STATS": "1",
        }
        # Engines that start at the same time would otherwise write the same cache in a shared home directory.
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
        # The engine would not notice a SIGTERM of this process and would keep the GPUs. So exit normally.
        self._terminated = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            self._engine = LLM(
                model=model,
                tensor_parallel_size=settings.tensor_parallel,
                quantization=settings.quantization,
                gpu_memory_utilization=settings.memory_share,
                enable_prefix_caching=True,
                trust_remote_code=False,
                load_format="safetensors",  # a pickled .bin is never loaded
                # The longest that memory allows. By default one request of the model's full length must fit.
                max_model_len=-1,
            )
        except RuntimeError as error:
            signal.signal(signal.SIGTERM, self._terminated)
            raise ValueError(f"vLLM did not start on {model}: {error}; its lines above say why") from error

    def close(self) -> None:
        self._engine.llm_engine.engine_core.shutdown(timeout=_SECONDS_TO_END)
        del self._engine
        gc.collect()
        signal.signal(signal.SIGTERM, self._terminated)

    def respond(self, requests: Sequence[Request]) -> list[Reply | Refusal]:
        stops = [stop_ids(self._tokenizer, request.sampling) for request in requests]
        prompts = [prompt_ids(request, self._tokenizer) for request in requests]
        found: dict[int, Reply | Refusal] = {}
        found |= overlong(requests, prompts, self._engine.model_config.max_model_len)
        asked = [i for i in range(len(requests)) if i not in found]
        outputs = self._engine.generate(
            [{"prompt_token_ids": prompts[i]} for i in asked],
            [
                self._parameters(
                    temperature=requests[i].sampling.temperature,
                    top_p=requests[i].sampling.top_p,
                    max_tokens=requests[i].sampling.max_tokens,
                    seed=requests[i].seed,
                    stop_token_ids=stops[i],
                    # Only the tokens of `stop` end a response, and not those of the model's config.
                    ignore_eos=True,
                    detokenize=False,
                )
                for i in asked
            ],
            use_tqdm=False,
        )
        for i, output in zip(asked, outputs, strict=True):
            found[i] = reply_of(list(output.outputs[0].token_ids), stops[i], self._tokenizer, prompts[i])
        return [found[i] for i in range(len(requests))]
