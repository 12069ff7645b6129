"""What our code asks of packages that tests cannot install has the names of those packages' own sources.

The tables were read off the sources of the versions named, as far as our code could use them. Whoever asks
for another name must look it up, and add it here. Our part is read off our source.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest

from megatron_post.launch.node_findings import GPU_FIELDS
from megatron_post.parallel.adam import ApexStyleAdam

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_post"

# vLLM 0.32.0: LLM.__init__ and LLM.generate (vllm/entrypoints/llm.py); EngineArgs, which takes what LLM does
# not name (vllm/engine/arg_utils.py); SamplingParams (vllm/sampling_params.py); shutdown of the client of the
# engine (vllm/v1/engine/core_client.py)
VLLM = {
    "LLM": {
        "model", "tokenizer", "skip_tokenizer_init", "trust_remote_code", "tensor_parallel_size", "dtype",
        "quantization", "seed", "gpu_memory_utilization", "enforce_eager",
        "enable_prefix_caching", "load_format", "max_model_len",
    },
    "generate": {"prompts", "sampling_params", "use_tqdm", "lora_request", "priority"},
    "_parameters": {
        "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
        "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens",
    },
    "shutdown": {"timeout"},
}  # fmt: skip
# NVIDIA DALI 2.4.0, nvidia/dali/pipeline.py: Pipeline.__init__; the signature of fn.external_source
DALI = {
    "Pipeline": {
        "batch_size", "num_threads", "device_id", "seed", "exec_pipelined", "prefetch_queue_depth",
        "exec_async", "exec_dynamic", "py_num_workers", "output_dtype", "output_ndim",
    },
    "external_source": {
        "source", "num_outputs", "cycle", "device", "layout", "dtype", "ndim", "cuda_stream", "blocking",
        "batch", "parallel", "no_copy", "batch_info",
    },
}  # fmt: skip
# `nvidia-smi --help-query-gpu`; newer drivers list "clocks_event_reasons", or the name that we use
NVIDIA_SMI = {
    "index", "name", "driver_version", "memory.total", "memory.used", "memory.free",
    "clocks_throttle_reasons.hw_slowdown", "ecc.errors.uncorrected.volatile.total",
}  # fmt: skip
# NVIDIA/apex at 004da4e, apex/optimizers/fused_adam.py: FusedAdam.__init__, less what our stand-in cannot do
APEX_ADAM = {"params", "lr", "betas", "eps", "weight_decay"}


def _keywords(file: str, function: str) -> set[str]:
    """Keywords that a file of the package gives to calls of a function or method of this name."""
    calls = [
        node
        for node in ast.walk(ast.parse((PACKAGE / file).read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == function
    ]
    assert calls, f"{file} does not call {function}"
    return {keyword.arg or "**" for call in calls for keyword in call.keywords}


@pytest.mark.parametrize("function", VLLM)
def test_vllm(function: str) -> None:
    assert _keywords("inference/vllm.py", function) <= VLLM[function]


@pytest.mark.parametrize("function", DALI)
def test_dali(function: str) -> None:
    """Beside the installed package too, where there is one."""
    asked = _keywords("data/dali.py", function)
    assert asked <= DALI[function]
    try:
        from nvidia import dali
    except ImportError:
        return
    installed = {"Pipeline": dali.Pipeline, "external_source": dali.fn.external_source}[function]
    assert asked <= set(inspect.signature(installed).parameters)


def test_nvidia_smi() -> None:
    queries = [
        fields
        for path in PACKAGE.rglob("*.py")
        for fields in re.findall(r'(?:--query-gpu=|fields = ")([a-z_.,]+)"', path.read_text())
    ]
    assert len(queries) >= 2
    assert {name for query in [GPU_FIELDS, *queries] for name in query.split(",")} <= NVIDIA_SMI


def test_apex() -> None:
    """Our Adam in the place of Apex's takes the same names."""
    names = set(inspect.signature(ApexStyleAdam).parameters)
    assert names >= APEX_ADAM
